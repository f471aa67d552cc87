"""Convert a model YAML and its weights to a pipeline folder of diffusers, for any number of layers.

Components are first planned from names and shapes; then tensors are computed and written one at a time.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from sgm.config.load import Config
from sgm.conversion import lora
from sgm.conversion.diffusers.config import CONTROL_PIPELINE, scheduler_config, transformer_config, vae_config
from sgm.conversion.diffusers.names import DIFFUSERS_PATCH, autoencoder_to_diffusers, network_to_diffusers
from sgm.conversion.modelspec import TIME_SCALING, default_title, lora_metadata, model_metadata, scaling_metadata
from sgm.conversion.writing import new_folder, total_bytes, write_shards
from sgm.io import write_json
from sgm.log import get_logger
from sgm.modules.embeddings import sincos_positions_3d
from sgm.modules.encoders.t5_folder import T5Folder
from sgm.modules.geometry import Geometry
from sgm.util import InputError, default, instantiate_from_config, without_allocating
from sgm.weights.adapters import is_adapter, read_adapter_info, scale_numerator, with_adapters
from sgm.weights.architecture import PATCH_WEIGHTS, POSITION_TABLE
from sgm.weights.checkpoint import released_patch
from sgm.weights.checksums import write_safetensors
from sgm.weights.files import find_weights, read_weights, run_config
from sgm.weights.lazy import LazyTensor, compute
from sgm.weights.lora.dora import is_magnitude
from sgm.weights.lora.merging import merge_adapters
from sgm.weights.lora.names import comfyui_name
from sgm.weights.match import match_autoencoder, match_network
from sgm.weights.stored import checked_ahead

logger = get_logger(__name__)

# Keys in the headers of weight files: the factor of `_fold`, and the dtype of the autoencoder in SAT.
FOLDED, SAT_DTYPE = "image_scale_folded", "sat_dtype"
TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)


@dataclass(frozen=True)
class Part:
    """One component of a pipeline.

    Attributes:
        name: of its folder.
        cls: library and class, for ``model_index.json``.
        configs: JSON files by name.
        tensors: its weights; empty for a scheduler or a tokenizer.
        stem: of the weight files.
        files: other files to copy.
        metadata: for the headers of the weight files.
    """

    name: str
    cls: tuple[str, str]
    configs: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    stem: str = "diffusion_pytorch_model"
    files: Sequence[Path] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path, *, max_shard_size: str) -> None:
        """Write the component into its folder below `folder`."""
        own = folder / self.name
        if self.tensors:
            write_shards(own, self.tensors, stem=self.stem, max_shard_size=max_shard_size, metadata=self.metadata)
        own.mkdir(exist_ok=True)
        for name, content in self.configs.items():
            write_json(own / name, content)
        for file in self.files:
            shutil.copyfile(file, own / file.name)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline folder to be written.

    Attributes:
        cls: its class in diffusers.
        parts: its components; `write` removes them one by one, to unmap their files.
        lora: tensors and header of a separate adapter file; None without adapters, or if they are merged.
    """

    cls: str
    parts: list[Part]
    lora: tuple[Mapping[str, LazyTensor], Mapping[str, str]] | None = None

    def write(
        self, folder: str | Path, *, max_shard_size: str = "5GB", check: Callable[[Path], None] | None = None
    ) -> None:
        """Write the folder atomically.

        Args:
            folder: to create.
            max_shard_size: of a weight file, e.g. ``"5GB"``.
            check: called with the complete folder before it appears; if it raises, nothing is written.

        Raises:
            InputError: the folder exists, cannot be written to, or does not fit on the disk.
        """
        adapters = {} if self.lora is None else self.lora[0]
        need = total_bytes(adapters, *(part.tensors for part in self.parts))
        index = {"_class_name": self.cls, "_diffusers_version": "0.42.0"}
        with new_folder(folder, need_bytes=need) as temporary:
            write_json(temporary / "model_index.json", index | {part.name: list(part.cls) for part in self.parts})
            while self.parts:
                self.parts.pop().write(temporary, max_shard_size=max_shard_size)
            if self.lora is not None:
                write_safetensors(temporary / lora.FILE, self.lora[0], metadata=self.lora[1])
            if check is not None:
                check(temporary)


def write_comfyui(transformer: Part, folder: str | Path) -> Path:
    """Write a transformer with ComfyUI's names as one file, for its folder ``models/diffusion_models``; return it.

    Raises:
        InputError: the folder exists, cannot be written to, or does not fit on the disk.
    """
    name = f"{Path(folder).absolute().name}.safetensors"
    with new_folder(folder, need_bytes=total_bytes(transformer.tensors)) as temporary:
        with checked_ahead(transformer.tensors.values()):
            write_safetensors(temporary / name, transformer.tensors, metadata=transformer.metadata)
    return Path(folder) / name


def pipeline_of(
    config: Config,
    *,
    without: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    adapters: Literal["merge", "keep"] = "merge",
    fold_image_scale: bool = False,
    title: str | None = None,
    style: lora.Style = "diffusers",
) -> Pipeline:
    """Describe the pipeline of a model YAML; weights are found and checked, not read.

    Args:
        config: with ``args.load``, ``ckpt_path`` of the autoencoder and ``model_dir`` of T5, unless excluded.
        without: components to exclude, of ``transformer, vae, text_encoder, tokenizer, scheduler``.
        dtype: of transformer and text encoder; None keeps that of their files. The autoencoder is float32.
        adapters: merge LoRA adapters into the transformer, or write them to a separate file.
        fold_image_scale: see `_fold`.
        title: of the transformer, see `sgm.conversion.modelspec`; None for that of its weights.
        style: whose names the transformer has.

    Raises:
        InputError: files are missing, damaged or do not fit, or diffusers has no such model.
    """
    if config.args.loras:
        raise InputError("args.loras is for sampling; merge them first (tools/merge_lora_weight.py), or remove it")
    config = with_adapters(config)
    parts: list[Part] = []
    kept = None
    if "transformer" not in without:
        named: str = default(title, default_title(config.args.load or ""))
        part, kept = _transformer(
            config, dtype=dtype, adapters=adapters, fold_image_scale=fold_image_scale, title=named, style=style
        )
        parts.append(part)
    if "vae" not in without:
        parts.append(_vae(config))
    if "text_encoder" not in without:
        parts.append(_text_encoder(config, dtype))
    if "tokenizer" not in without:
        parts.append(_tokenizer(config))
    if "scheduler" not in without:
        schedule = {"scheduler_config.json": scheduler_config(config.model)}
        parts.append(Part("scheduler", ("diffusers", "CogVideoXDDIMScheduler"), schedule))
    return Pipeline(_pipeline_class(_geometry(config)), parts, kept)


def _pipeline_class(geometry: Geometry) -> str:
    """Return the pipeline of diffusers for a network.

    Raises:
        InputError: it has none.
    """
    if not geometry.control_channels:
        return "CogVideoXImageToVideoPipeline" if geometry.image_conditioned else "CogVideoXPipeline"
    if geometry.image_conditioned:
        raise InputError(
            "the network takes an image and a control video, and diffusers has no pipeline with both; it can only be "
            "sampled here"
        )
    return CONTROL_PIPELINE


def _geometry(config: Config) -> Geometry:
    return Geometry.from_network(config.model["network_config"]["params"])


def _scales_image_latents(config: Config) -> bool:
    scales = config.model.get("scale_image_latents")
    return _geometry(config).patch_size[0] == 1 if scales is None else scales


def _transformer(
    config: Config, *, dtype: torch.dtype | None, adapters: str, fold_image_scale: bool, title: str, style: lora.Style
) -> tuple[Part, tuple[Mapping[str, LazyTensor], Mapping[str, str]] | None]:
    """Describe the transformer, and the adapters if written separately."""
    params, geometry = config.model["network_config"]["params"], _geometry(config)
    description = transformer_config(params)
    if params.get("ofs_embed_dim") and config.model.get("ofs", 2.0) != 2.0:
        raise InputError(f"model.ofs is {config.model['ofs']}; the pipelines of diffusers always give 2.0")
    if config.args.load is None:
        raise InputError("args.load names no transformer; give it, or leave the transformer out")
    with without_allocating():
        network = instantiate_from_config(config.model["network_config"])
    match = match_network(network, config.args.load, base=config.args.base, allow_missing_adapters=False)
    own, kept = dict(match.tensors), None
    if POSITION_TABLE in own and geometry.positions == "sincos":
        _require_computed(compute(own[POSITION_TABLE]), params)
    if any(map(is_adapter, own)):
        lora_params = params["modules"]["lora_config"].get("params") or {}
        alpha = scale_numerator(lora_params)
        if adapters == "keep":
            if fold_image_scale and not {*PATCH_WEIGHTS[2:]}.isdisjoint(own):
                raise InputError(
                    "--fold_image_scale changes the patch projection, and --lora keep leaves adapters of it out of the "
                    "transformer; merge them (--lora merge)"
                )
            if geometry.control_channels:
                raise InputError(
                    "the adapters were trained with a control, whose columns of the patch projection no LoRA file of "
                    "diffusers can hold; merge them into the transformer"
                )
            released = partial(released_patch, geometry.patch_size)
            patch = {name: LazyTensor((own[name],), released) for name in PATCH_WEIGHTS[2:] if name in own}
            kept, header = lora.adapters_to_diffusers(own | patch, alpha=alpha, rank=lora_params["r"])
            described = lora_metadata(
                find_weights(config.args.load),
                rank=lora_params["r"],
                alpha=alpha,
                info=read_adapter_info(config.args.load),
                title=title,
                implementation="diffusers",
            )
            kept = kept, described | header
        if dtype is not None:  # round once, directly to `dtype`
            own = {
                # Norms are rounded as the magnitudes of DoRA were, by their dtype.
                name: tensor if is_magnitude(name) else LazyTensor((tensor,), to_dtype=torch.float32)
                for name, tensor in own.items()
            }
        own = merge_adapters(own, alpha=alpha, rank=lora_params["r"], strength=float(adapters == "merge"))
    tensors = network_to_diffusers(
        own, patch_size=geometry.patch_size, learned_positions=geometry.positions == "learned"
    )
    tensors = {name: tensor.cast(dtype) for name, tensor in tensors.items()}
    metadata = model_metadata(config.model, title=title, implementation=style)
    if kept is None:
        file = find_weights(config.args.load)
        metadata |= scaling_metadata(file, run_config(file))
    else:  # which has warned of it
        metadata |= {key: value for key, value in kept[1].items() if key == TIME_SCALING}
    metadata |= {FOLDED: repr(_fold(config, tensors, geometry))} if fold_image_scale else {}
    if style == "comfyui":
        tensors = {comfyui_name(name): tensor for name, tensor in tensors.items()}
    cls = ("diffusers", "CogVideoXTransformer3DModel")
    return Part("transformer", cls, {"config.json": description}, tensors, metadata=metadata), kept


def position_table(params: Mapping[str, Any]) -> torch.Tensor:
    """Return the sine-cosine table (1, L + N, D) of a network, float32.

    Args:
        params: ``model.network_config.params`` of a network with such a table.
    """
    with without_allocating():
        network: Any = instantiate_from_config({"target": "dit_video_concat.DiffusionTransformer", "params": params})
    description = transformer_config(params)
    spatial = description["spatial_interpolation_scale"]
    interpolation = (description["temporal_interpolation_scale"], spatial, spatial)
    positions = sincos_positions_3d(network.grid, network.hidden_size, interpolation)
    return torch.cat((positions.new_zeros(description["max_text_seq_length"], positions.shape[1]), positions))[None]


def _require_computed(table: torch.Tensor, params: Mapping[str, Any]) -> None:
    """Refuse a position table that differs from the one diffusers computes."""
    difference = (table.float() - position_table(params)).abs().max().item()
    if not difference <= 1e-2:  # bfloat16 rounds by up to 4e-3
        raise InputError(
            f"{POSITION_TABLE} differs by {difference:.2g} from the sine-cosine table that diffusers computes itself; "
            "it cannot be converted. Check height_interpolation and width_interpolation of the model YAML"
        )


def _fold(config: Config, tensors: dict[str, LazyTensor], geometry: Geometry) -> float:
    """Multiply the image channels of the patch projection by the scale factor; return it.

    If SAT uses unscaled image latents, diffusers divides them by the scale factor. The folded weights undo that, so the
    pipeline of diffusers has the same output as SAT.
    """
    if not geometry.image_conditioned or _scales_image_latents(config):
        raise InputError(
            "--fold_image_scale is for image-to-video models that take image latents unscaled (1.5-5B-I2V); leave it "
            "out: for this model the pipelines of diffusers scale as SAT does"
        )
    factor = float(config.model.get("scale_factor", 1.0))
    tensors[DIFFUSERS_PATCH] = with_image_channels(
        tensors[DIFFUSERS_PATCH], geometry.in_channels, geometry.out_channels, lambda part: part * factor
    )
    return factor


def with_image_channels(
    weight: torch.Tensor | LazyTensor,
    in_channels: int,
    out_channels: int,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> LazyTensor:
    """Return a patch projection, in either shape, with its image channels changed in float32.

    Args:
        weight: [D, C, p, p] or [D, C·pt·p·p].
        in_channels: C; the first `out_channels` are those of the noisy latents.
        out_channels: channels of the latents.
        change: function applied to the weights of the other channels.
    """

    def make(weight: torch.Tensor) -> torch.Tensor:
        channels = weight.unflatten(1, (in_channels, -1)) if weight.ndim == 2 else weight
        changed = change(channels[:, out_channels:].float()).to(weight.dtype)
        return torch.cat((channels[:, :out_channels], changed), dim=1).reshape(weight.shape)

    return LazyTensor((weight,), make)


def _vae(config: Config) -> Part:
    section = config.model.get("first_stage_config")
    if section is None:
        raise InputError("the model YAML has no first_stage_config, so there is no autoencoder; leave the vae out")
    description = vae_config(
        section,
        scale_factor=config.model.get("scale_factor", 1.0),
        scale_image_latents=_scales_image_latents(config),
        size=_geometry(config).default_size(),
    )
    path = section["params"].get("ckpt_path")
    if path is None:
        raise InputError(
            "model.first_stage_config.params.ckpt_path names no autoencoder; give it, or leave the vae out"
        )
    with without_allocating():
        vae = instantiate_from_config(section)
    own = match_autoencoder(vae, path, ignore_keys=section["params"].get("ignore_keys") or ()).tensors
    names = autoencoder_to_diffusers(own)
    tensors = {names[name]: LazyTensor((tensor,), to_dtype=torch.float32) for name, tensor in own.items()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in own.values()}
    metadata = {SAT_DTYPE: dtypes.pop()} if len(dtypes) == 1 else {}
    cls = ("diffusers", "AutoencoderKLCogVideoX")
    return Part("vae", cls, {"config.json": description}, tensors, metadata=metadata)


def _embedder(config: Config) -> Mapping[str, Any]:
    """Return the parameters of the T5 embedder."""
    models = ((config.model.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    found = [entry for entry in models if str(entry.get("target", "")).endswith(".FrozenT5Embedder")]
    if len(found) != 1:
        raise InputError(
            f"model.conditioner_config has {len(found)} FrozenT5Embedder, and the pipelines of diffusers have one T5; "
            "leave text_encoder and tokenizer out"
        )
    return found[0]["params"]


def _text_encoder(config: Config, dtype: torch.dtype | None) -> Part:
    folder = T5Folder(Path(_embedder(config)["model_dir"]))
    folder.check()
    folder.check_weights()
    content = dict(folder.config)
    if dtype is not None:
        content |= {"dtype": str(dtype).removeprefix("torch.")}
        content.pop("torch_dtype", None)  # its name before transformers 5
    tensors = {
        name: LazyTensor((tensor,), to_dtype=dtype)
        for shard in folder.shards
        for name, tensor in read_weights(shard).items()
    }
    return Part("text_encoder", ("transformers", "T5EncoderModel"), {"config.json": content}, tensors, stem="model")


def _tokenizer(config: Config) -> Part:
    params = _embedder(config)
    folder = Path(params["model_dir"])
    T5Folder(folder).tokenizer  # noqa: B018 (raises where it is missing or damaged)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    configs = {}
    if not (folder / "tokenizer_config.json").is_file():
        configs["tokenizer_config.json"] = {
            "tokenizer_class": "T5Tokenizer",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "extra_ids": 0,
            "model_max_length": params.get("max_length", 226),
        }
    return Part("tokenizer", ("transformers", "T5Tokenizer"), configs, files=files)
