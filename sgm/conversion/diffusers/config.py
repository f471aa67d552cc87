"""Translate sections of a model YAML to diffusers configurations and back; refuse what has no equivalent.

The configurations are ``config.json`` of CogVideoXTransformer3DModel and AutoencoderKLCogVideoX, and
``scheduler_config.json`` of CogVideoXDDIMScheduler, whose keys CogVideoXDPMScheduler shares.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from sgm.config.values import misfit, spelled
from sgm.modules.geometry import Geometry
from sgm.project import project
from sgm.util import InputError, default

DIT = "dit_video_concat"
SINCOS, ROTARY = f"{DIT}.Basic3DPositionEmbeddingMixin", f"{DIT}.Rotary3DPositionEmbeddingMixin"
_PARAMS = "model.network_config.params"
_BETAS = {"linear_start": 0.00085, "linear_end": 0.012, "num_timesteps": 1000, "shift_scale": 1.0}
_TEMPLATE = project() / "configs" / "cogvideox_5b.yaml"
# diffusers values that are fixed in this project.
_FIXED_TRANSFORMER = {
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
    "attention_bias": True,
}
_FIXED_VAE = {
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
_Count = Annotated[int, Field(ge=1, le=1_000_000)]
_Positive = Annotated[float, Field(gt=0, le=1_000_000)]
CONTROL_PIPELINE = "CogVideoXFunControlPipeline"  # of networks with a control
_NEEDED_OF_TRANSFORMER = ("patch_size", "in_channels", "out_channels", "num_attention_heads", "attention_head_dim")
_NEEDED_OF_TRANSFORMER += ("num_layers", "time_embed_dim")
_TRANSFORMER_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(_NEEDED_OF_TRANSFORMER, _Count),
    "num_layers": Annotated[int, Field(ge=1, le=1000)],
    "patch_size_t": Annotated[int | None, Field(ge=1, le=1_000_000)],
    "ofs_embed_dim": Annotated[int | None, Field(ge=1, le=1_000_000)],
    **dict.fromkeys(
        ("max_text_seq_length", "text_embed_dim", "sample_frames", "sample_width", "sample_height"), _Count
    ),
    "temporal_compression_ratio": _Count,
    **dict.fromkeys(("spatial_interpolation_scale", "temporal_interpolation_scale", "norm_eps"), _Positive),
    **dict.fromkeys(("use_rotary_positional_embeddings", "use_learned_positional_embeddings"), bool),
    **dict.fromkeys(("patch_bias", "norm_elementwise_affine"), bool),
}
_NEEDED_OF_VAE = ("block_out_channels", "latent_channels", "layers_per_block")
_VAE_TYPES: Mapping[str, Any] = {
    "block_out_channels": Annotated[list[_Count], Field(min_length=1)],
    "latent_channels": _Count,
    "layers_per_block": Annotated[int, Field(ge=1, le=100)],
    "temporal_compression_ratio": Annotated[float, Field(gt=0, le=1_000_000, multiple_of=1)],
    "scaling_factor": _Positive,
    "invert_scale_latents": bool,
}
_SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
_SCHEDULER_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("beta_start", "beta_end"), Annotated[float, Field(gt=0, lt=1)]),
    "snr_shift_scale": _Positive,
    "num_train_timesteps": Annotated[int, Field(ge=1, le=100_000)],
}
# What diffusers takes for keys that decide the noise levels and are not there.
_SCHEDULER_DEFAULTS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "snr_shift_scale": 3.0,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_FIXED_SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def transformer_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the equivalent CogVideoXTransformer3DModel.

    Args:
        params: ``model.network_config.params``; a ``lora_config`` is ignored.

    Raises:
        InputError: diffusers has no equivalent.
    """
    geometry = Geometry.from_network(params)
    modules = params["modules"]
    position = modules["pos_embed_config"]
    pos_params = position.get("params") or {}
    _refuse_foreign(params)
    heights, widths, times = (_interpolation(params, pos_params, axis) for axis in ("height", "width", "time"))
    if geometry.positions == "sincos" and heights != widths:
        _refuse(f"height_interpolation {heights} and width_interpolation {widths}", "one for both")
    pt, patch, patch_width = geometry.patch_size
    if patch != patch_width:
        _refuse(f"patches of {patch}x{patch_width}", "square ones")
    heads, hidden = params["num_attention_heads"], params["hidden_size"]
    patch_params = modules["patch_embed_config"].get("params") or {}
    bias = patch_params.get("bias", True)
    if pt > 1 and not bias:
        _refuse("a patch projection over time without bias", "one with bias")
    return {
        "_class_name": "CogVideoXTransformer3DModel",
        **_FIXED_TRANSFORMER,
        "num_attention_heads": heads,
        "attention_head_dim": hidden // heads,
        "num_layers": params["num_layers"],
        "in_channels": params["in_channels"] + (params.get("control_channels") or 0),
        "out_channels": params["out_channels"],
        "time_embed_dim": params["time_embed_dim"],
        "ofs_embed_dim": params.get("ofs_embed_dim"),
        "text_embed_dim": patch_params["text_hidden_size"],
        "max_text_seq_length": pos_params["text_length"],
        "patch_size": patch,
        "patch_size_t": None if pt == 1 else pt,
        "patch_bias": bias,
        "sample_frames": params["num_frames"],
        "sample_height": params["latent_height"],
        "sample_width": params["latent_width"],
        "temporal_compression_ratio": geometry.time_compression,
        "norm_elementwise_affine": params.get("elementwise_affine", True),
        "norm_eps": (params.get("transformer_args") or {}).get("layernorm_epsilon", 1e-5),
        "spatial_interpolation_scale": heights,
        "temporal_interpolation_scale": times,
        "use_rotary_positional_embeddings": geometry.positions != "sincos",
        "use_learned_positional_embeddings": geometry.positions == "learned",
    }


def _interpolation(params: Mapping[str, Any], pos_params: Mapping[str, Any], axis: str) -> float:
    """Return the divisor of positions along an axis; the mixin's value wins."""
    name = f"{axis}_interpolation"
    return float(default(pos_params.get(name), default(params.get(name), 1.0)))


def _refuse(has: str, can: str) -> None:
    raise InputError(f"{_PARAMS}: the network has {has}; diffusers' transformer knows {can}, so it cannot be converted")


def _refuse_foreign(params: Mapping[str, Any]) -> None:
    modules = params["modules"]
    position = (modules["pos_embed_config"].get("params") or {}).get("theta", 10000.0)
    if params.get("use_SwiGLU"):
        _refuse("a gated MLP (use_SwiGLU)", "GELU")
    if params.get("use_RMSNorm"):
        _refuse("RMS norms (use_RMSNorm)", "layer norms")
    if not (modules["adaln_layer_config"].get("params") or {}).get("qk_ln", True):
        _refuse("no norms of queries and keys (qk_ln: false)", "these norms alone")
    if position != 10000.0:
        _refuse(f"rotary positions with theta {position}", "10000 alone")
    own = {
        "pos_embed_config": (SINCOS, ROTARY),
        "patch_embed_config": (f"{DIT}.ImagePatchEmbeddingMixin",),
        "adaln_layer_config": (f"{DIT}.AdaLNMixin",),
        "final_layer_config": (f"{DIT}.FinalLayerMixin",),
    }
    for name, targets in own.items():
        if modules[name].get("target") not in targets:
            _refuse(f"a mixin of its own ({modules[name].get('target')})", "those of this project")


def network_params(config: Mapping[str, Any], file: str | Path) -> dict[str, Any]:
    """Return ``model.network_config.params`` for a transformer of diffusers: the inverse of `transformer_config`.

    Args:
        config: of the transformer.
        file: that holds it, for messages.

    Raises:
        InputError: not a CogVideoX transformer, or no equivalent here.
    """
    _require_class(config, file, "CogVideoXTransformer3DModel")
    _require_types(config, file, _TRANSFORMER_TYPES, _NEEDED_OF_TRANSFORMER)
    _require(config, file, _FIXED_TRANSFORMER)
    pt, patch = default(config.get("patch_size_t"), 1), config["patch_size"]
    rotary = bool(config.get("use_rotary_positional_embeddings"))
    position: dict[str, Any] = {"target": ROTARY if rotary else SINCOS, "params": {}}
    position["params"]["text_length"] = config.get("max_text_seq_length", 226)
    if rotary:
        position["params"]["hidden_size_head"] = config["attention_head_dim"]
        if config.get("use_learned_positional_embeddings"):
            position["params"]["learnable_pos_embed"] = True
    else:
        scale = config.get("spatial_interpolation_scale", 1.875)
        position["params"] |= {"height_interpolation": scale, "width_interpolation": scale}
        if (time := config.get("temporal_interpolation_scale", 1.0)) != 1.0:
            position["params"]["time_interpolation"] = time
    patch_embed: dict[str, Any] = {"text_hidden_size": config.get("text_embed_dim", 4096)}
    if pt == 1 and not config.get("patch_bias", True):
        patch_embed["bias"] = False
    params = {
        "num_frames": config.get("sample_frames", 49),
        "time_compressed_rate": config.get("temporal_compression_ratio", 4),
        "latent_width": config.get("sample_width", 90),
        "latent_height": config.get("sample_height", 60),
        "patch_size": patch if pt == 1 else [pt, patch, patch],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "num_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "time_embed_dim": config["time_embed_dim"],
        "elementwise_affine": config.get("norm_elementwise_affine", True),
        "transformer_args": {"checkpoint_activations": False, "max_sequence_length": 64},
        "modules": {
            "pos_embed_config": position,
            "patch_embed_config": {"target": f"{DIT}.ImagePatchEmbeddingMixin", "params": patch_embed},
            "adaln_layer_config": {"target": f"{DIT}.AdaLNMixin", "params": {"qk_ln": True}},
            "final_layer_config": {"target": f"{DIT}.FinalLayerMixin"},
        },
    }
    if config.get("norm_eps", 1e-5) != 1e-5:
        params["transformer_args"]["layernorm_epsilon"] = config["norm_eps"]
    if config.get("ofs_embed_dim"):
        params["ofs_embed_dim"] = config["ofs_embed_dim"]
    return params


def vae_config(
    section: Mapping[str, Any], *, scale_factor: float, scale_image_latents: bool, size: tuple[int, int]
) -> dict[str, Any]:
    """Return the configuration of the equivalent AutoencoderKLCogVideoX.

    Args:
        section: ``model.first_stage_config``.
        scale_factor: of the model.
        scale_image_latents: whether the model scales image latents; if not, diffusers divides them by `scale_factor`.
        size: (height, width) in pixels; sets the tile size of diffusers.

    Raises:
        InputError: encoder and decoder differ.
    """
    encoder, decoder = (
        dict(section["params"][f"{part}_config"].get("params") or {}) for part in ("encoder", "decoder")
    )
    shape = {}
    for name, fallback in {"ch": None, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 3, "z_channels": 16}.items():
        values = [list(v) if isinstance(v := part.get(name, fallback), Sequence) else v for part in (encoder, decoder)]
        if values[0] != values[1]:
            raise InputError(
                f"model.first_stage_config: {name} is {values[0]} in the encoder and {values[1]} in the decoder; "
                "diffusers' autoencoder has one for both"
            )
        shape[name] = values[0]
    levels = len(shape["ch_mult"])
    return {
        "_class_name": "AutoencoderKLCogVideoX",
        **_FIXED_VAE,
        "in_channels": encoder.get("in_channels", 3),
        "out_channels": decoder.get("out_ch", 3),
        "block_out_channels": [shape["ch"] * factor for factor in shape["ch_mult"]],
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "layers_per_block": shape["num_res_blocks"],
        "latent_channels": shape["z_channels"],
        "temporal_compression_ratio": encoder.get("temporal_compress_times", 4),
        "scaling_factor": scale_factor,
        "invert_scale_latents": not scale_image_latents,
        "sample_height": size[0],
        "sample_width": size[1],
        "force_upcast": True,
    }


def vae_params(config: Mapping[str, Any], file: str | Path) -> dict[str, Any]:
    """Return the parameters of encoder and decoder in ``model.first_stage_config`` for an autoencoder of diffusers.

    Args:
        config: of the autoencoder.
        file: that holds it, for messages.

    Raises:
        InputError: not a CogVideoX autoencoder, or no equivalent here.
    """
    _require_class(config, file, "AutoencoderKLCogVideoX")
    _require_types(config, file, _VAE_TYPES, _NEEDED_OF_VAE)
    _require(config, file, _FIXED_VAE)
    channels = list(config["block_out_channels"])
    if any(width % channels[0] for width in channels):
        raise InputError(f"{file}: block_out_channels {channels} are not multiples of the first of them")
    return {
        "z_channels": config["latent_channels"],
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": config["layers_per_block"],
        **(
            {} if (time := config.get("temporal_compression_ratio", 4)) == 4 else {"temporal_compress_times": int(time)}
        ),
    }


def scheduler_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the CogVideoXDDIMScheduler with the same noise levels.

    Args:
        model: the ``model`` section; the denoiser's discretization is used.

    Raises:
        InputError: diffusers has no equivalent.
    """
    path = "model.denoiser_config.params.discretization_config"
    params = (model["denoiser_config"]["params"]["discretization_config"].get("params") or {}) | {}
    for name in ("keep_start", "post_shift"):
        if params.get(name):
            raise InputError(f"{path}.params.{name}: the schedulers of diffusers shift in one way, without it")
    values = _BETAS | {name: value for name, value in params.items() if name in _BETAS}
    return {
        "_class_name": "CogVideoXDDIMScheduler",
        **_FIXED_SCHEDULER,
        "beta_start": values["linear_start"],
        "beta_end": values["linear_end"],
        "num_train_timesteps": values["num_timesteps"],
        "snr_shift_scale": float(values["shift_scale"]),
        "clip_sample_range": 1.0,
        "sample_max_value": 1.0,
        "steps_offset": 0,
    }


def discretization_params(config: Mapping[str, Any], file: str | Path) -> dict[str, Any]:
    """Return the parameters of a ZeroSNRDDPMDiscretization for a scheduler of diffusers.

    Args:
        config: of the scheduler.
        file: that holds it, for messages.

    Raises:
        InputError: its noise levels are others, or its prediction.
    """
    _require_class(config, file, *_SCHEDULERS)
    _require_types(config, file, _SCHEDULER_TYPES)
    whole = {**_SCHEDULER_DEFAULTS, **config}
    fixed = {name: _FIXED_SCHEDULER[name] for name in ("beta_schedule", "prediction_type", "rescale_betas_zero_snr")}
    _require(whole, file, fixed | {"trained_betas": None})
    if whole["beta_start"] > whole["beta_end"]:
        raise InputError(f"{file}: beta_start is above beta_end; download it again")
    names = {"linear_start": "beta_start", "linear_end": "beta_end", "num_timesteps": "num_train_timesteps"}
    params = {ours: whole[theirs] for ours, theirs in names.items() if whole[theirs] != _BETAS[ours]}
    return params | {"shift_scale": float(whole["snr_shift_scale"])}


def model_yaml(
    configs: Mapping[str, Mapping[str, Any]],
    *,
    files: Mapping[str, Path] | None = None,
    template: Path | None = None,
) -> dict[str, Any]:
    """Return a model YAML: a template, updated from diffusers configurations.

    Args:
        configs: JSON of ``transformer``, ``vae`` and ``scheduler``; each optional.
        files: that hold them, for messages.
        template: a model file; None is that of the 5B.

    Raises:
        InputError: a component is not CogVideoX, or has no equivalent here.
    """
    content: dict[str, Any] = yaml.safe_load((template or _TEMPLATE).read_text(encoding="utf-8"))
    content = copy.deepcopy(content)  # the anchors of the file are one object
    args, model = content["args"], content["model"]
    named: dict[str, str | Path] = {part: f"the config.json of the {part}" for part in ("transformer", "vae")}
    named |= {"scheduler": "its scheduler_config.json", **(files or {})}
    if (vae := configs.get("vae")) is not None:
        shared = vae_params(vae, named["vae"])
        for part in ("encoder_config", "decoder_config"):
            model["first_stage_config"]["params"][part]["params"] = dict(shared)
        model["scale_factor"] = vae.get("scaling_factor", 1.15258426)
    if (scheduler := configs.get("scheduler")) is not None:
        params = discretization_params(scheduler, named["scheduler"])
        for section in (
            model["denoiser_config"]["params"],
            model["loss_fn_config"]["params"]["sigma_sampler_config"]["params"],
            model["sampler_config"]["params"],
        ):
            section["discretization_config"]["params"] = dict(params)
            if "num_idx" in section:
                section["num_idx"] = params.get("num_timesteps", _BETAS["num_timesteps"])
    if (transformer := configs.get("transformer")) is not None:
        _set_network(args, model, network_params(transformer, named["transformer"]), configs.get("vae", {}))
    return content


def _set_network(args: dict[str, Any], model: dict[str, Any], params: dict[str, Any], vae: Mapping[str, Any]) -> None:
    geometry = Geometry.from_network(params)
    model["network_config"]["params"] = params
    length = params["modules"]["pos_embed_config"]["params"]["text_length"]
    model["conditioner_config"]["params"]["emb_models"][0]["params"]["max_length"] = length
    padded = geometry.padded_latents(geometry.max_latents)
    args["sampling_num_frames"] = padded
    args["latent_channels"] = params["out_channels"]
    args["sampling_image_size"] = list(geometry.default_size())
    args["sampling_fps"] = 16 if geometry.patch_size[0] > 1 else 8
    args["image2video"] = geometry.image_conditioned
    if geometry.image_conditioned:
        scales = not vae.get("invert_scale_latents", geometry.patch_size[0] > 1)
        model |= {"noised_image_input": True, "noised_image_dropout": 0.05, "scale_image_latents": scales}
        if geometry.patch_size[0] > 1:
            args["sampling_image_size"] = None  # the shape of the image
    if params.get("ofs_embed_dim"):
        model["ofs"] = 2.0


def _require_class(config: Mapping[str, Any], file: str | Path, *names: str) -> None:
    if (found := config.get("_class_name")) not in names:
        what = f"a {found}" if isinstance(found, str) else "a model without _class_name"
        raise InputError(f"{file} describes {what}, not a {' or '.join(names)}; only CogVideoX models are converted")


def _require_types(
    config: Mapping[str, Any], file: str | Path, types: Mapping[str, Any], needed: Sequence[str] = ()
) -> None:
    """Refuse a configuration with a wrong value, or without one that is needed."""
    for name in needed:
        if name not in config:
            raise InputError(f"{file} lacks '{name}'; download it again")
    for name, hint in types.items():
        if name in config and (problem := misfit(config[name], hint)):
            raise InputError(f"{file}: {name} {problem[0]}; {problem[1]}")


def _require(config: Mapping[str, Any], file: str | Path, fixed: Mapping[str, Any]) -> None:
    for name, value in fixed.items():
        if name in config and config[name] != value:
            found, own = spelled(config[name]), spelled(value)
            raise InputError(f"{file} has {name}={found}, and this project's has {own}")
