"""Check files, shapes, precision and device before a run, without reading weights.

Every finding is a `Problem` with the YAML path of its cause; all are reported together.
"""

import contextlib
import errno
import importlib.util
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgm.checks.sampling_plan import SamplingPlan, check_sampling, listed_numbers, scaling_warnings
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, ConfigError, Problem, SamplingArgs, text_encoders
from sgm.config.precision import autoencoder_dtype, conv3d_warnings, precision_name, resolve_precision
from sgm.config.values import shortened, spelled
from sgm.distributed import resolve_device
from sgm.io import denied_text
from sgm.log import get_logger, warn_once
from sgm.modules.diffusionmodules.guiders import has_effect
from sgm.modules.geometry import Geometry
from sgm.modules.step_cache import StepCache
from sgm.parallel.attention import require_attention
from sgm.util import InputError, default, instantiate_from_config, nearest_path, without_allocating
from sgm.weights.adapters import TITLES, read_adapter_info
from sgm.weights.files import find_weights
from sgm.weights.lora.several import stack_of
from sgm.weights.match import match_autoencoder, match_network
from sgm.weights.quantize import require_usable

logger = get_logger(__name__)

_NETWORK = "model.network_config.params"


def check_files(config: Config) -> list[Problem]:
    """Return the files and folders of a run that are missing or unusable."""
    problems = [] if config.mode == "encode" else _input_file_problems(config)
    vae = config.model.get("first_stage_config")
    if vae is not None and _needs_vae(config):
        path, weights = "model.first_stage_config.params.ckpt_path", params_of(vae).get("ckpt_path")
        if not Path(str(weights)).is_file():
            found = "the VAE has no weights"
            if weights is not None:
                found = f"there is no file '{weights}'{nearest_path(weights)}"
            cure = f"set {path} to the VAE's weights, which come as vae/3d-vae.pt"
            problems.append(Problem(path, "", found, cure))
    if config.model.get("conditioner_config") is not None:
        path = "model.conditioner_config"
        cure = "set model_dir there to the folder of this model's T5"
        problems += problems_of(path, cure, partial(_check_text_encoder, config))
    return problems


def _needs_vae(config: Config) -> bool:
    """Whether a run decodes latents, or encodes an image or a video; training encodes clips, if they are videos."""
    args, keeps_latents = config.args, config.args.only_save_latents
    if isinstance(args, TrainingArgs):  # which says otherwise what becomes of samples
        keeps_latents = bool(config.model.get("latent_input")) and (
            args.eval_interval is None or args.only_log_video_latents
        )
    encodes = bool(config.model.get("noised_image_input")) or takes_control(config) or args.encodes_clips
    return not keeps_latents or encodes


def _input_file_problems(config: Config) -> list[Problem]:
    """Return problems of the network's weights and the prompts."""
    args, problems = config.args, []
    if args.load is None and config.mode == "inference":  # pretraining needs none
        cure = "add args.load=<folder that holds 'latest'>; the README shows the layout of checkpoints"
        problems.append(Problem("args.load", "", "no checkpoint folder is given", cure))
    elif args.load is not None:
        cure = "set args.load; the README shows the layout of checkpoints"
        problems += problems_of("args.load", cure, partial(find_weights, args.load))
    file = args.input_file if args.prompt is None and args.input_type == "txt" else None
    if file is not None and not os.path.isfile(file):
        cure = "correct args.input_file: a text file with a prompt a line"
        found = f"there is no file '{file}'{nearest_path(file)}"
        problems.append(Problem("args.input_file", "", found, cure))
    return problems


def _check_text_encoder(config: Config) -> None:
    conditioner = instantiate_from_config(config.model["conditioner_config"])
    conditioner.check()
    modules = params_of(config.model.get("network_config")).get("modules") or {}
    wanted = params_of(modules.get("patch_embed_config")).get("text_hidden_size")
    for embedder in conditioner.embedders if config.args.text_encoder_weights else ():
        if not hasattr(embedder, "storage"):
            found = f"is {config.args.text_encoder_weights}, but {type(embedder).__name__} has no attribute storage"
            raise ConfigError([Problem("args.text_encoder_weights", "", found, "remove it, or add that attribute")])
    sizes = [embedder.embed_dim for embedder in conditioner.embedders if hasattr(embedder, "embed_dim")]
    if sizes and wanted is not None and sum(sizes) != wanted:
        raise InputError(
            f"the text encoder gives embeddings of size {sum(sizes)}, but the network takes {wanted} "
            f"({_NETWORK}.modules.patch_embed_config.params.text_hidden_size); give the T5 of this model"
        )


def params_of(section: Any) -> Mapping[str, Any]:
    """Return the parameters of a ``{target, params}`` section; empty if it is missing."""
    return (section or {}).get("params") or {}


def takes_control(config: Config) -> bool:
    """Whether the network takes a control video."""
    return bool(params_of(config.model.get("network_config")).get("control_channels"))


def problems_of(path: str, cure: str, check: Callable[[], Any]) -> list[Problem]:
    """Run `check` and return its errors as problems at `path`."""
    try:
        check()
    except ConfigError as error:
        return list(error.problems)
    except InputError as error:
        return [Problem(path, "", str(error), cure)]
    except PermissionError as error:
        return [Problem(path, "", denied_text(error), cure)]
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        return [Problem(path, "", f"{error.strerror}: {shortened(str(error.filename))}", "give another path")]
    return []


def check_shapes(config: Config, geometry: Geometry) -> list[Problem]:
    """Return mismatched shapes between text encoder, network and VAE."""
    modules = params_of(config.model.get("network_config")).get("modules") or {}
    positions = "modules.pos_embed_config.params.text_length"
    text_length = params_of(modules.get("pos_embed_config")).get("text_length")
    pairs = []
    for path, embedder in text_encoders(config.model):
        pairs.append(
            (f"{path}.params.max_length", params_of(embedder).get("max_length"), f"{_NETWORK}.{positions}", text_length)
        )
    vae = params_of(config.model.get("first_stage_config"))
    for part in ("encoder_config", "decoder_config"):
        path = f"model.first_stage_config.params.{part}.params.z_channels"
        channels = params_of(vae.get(part)).get("z_channels")
        pairs.append((path, channels, f"{_NETWORK}.out_channels", geometry.out_channels))
    problems = [
        Problem(path, "", f"is {value}, but {other_path} is {other}", "make them equal, as in the shipped model files")
        for path, value, other_path, other in pairs
        if value is not None and other is not None and value != other
    ]
    num_frames = params_of(config.model["network_config"])["num_frames"]
    if num_frames != geometry.video_frames(geometry.max_latents):
        used = geometry.video_frames(geometry.max_latents)
        logger.warning("%s.num_frames is %d, which no video has; the longest has %d", _NETWORK, num_frames, used)
    wants_image = bool(config.model.get("noised_image_input", False))
    if wants_image != geometry.image_conditioned:
        found = f"is {str(wants_image).lower()}, which contradicts in_channels {geometry.in_channels}"
        cure = f"set it to {str(geometry.image_conditioned).lower()}, or correct {_NETWORK}.in_channels"
        problems.append(Problem("model.noised_image_input", "", found, cure))
    return problems


def _check_settings(config: Config, for_card: bool) -> tuple[dict[str, Any], list[Problem]]:
    """Return the legal ones of geometry, plan, device and dtype, and all problems."""
    args, problems, facts = config.args, check_files(config), {}

    def collect(name: str, path: str, work: Callable[[], Any]) -> None:
        cure = "correct it, in the file or on the command line"
        problems.extend(problems_of(path, cure, lambda: facts.update({name: work()})))

    collect("geometry", _NETWORK, lambda: Geometry.from_network(params_of(config.model["network_config"])))
    if "geometry" in facts:
        collect("plan", "args", lambda: check_sampling(args, facts["geometry"]))
        if "plan" in facts:
            warn_once(logger, scaling_warnings(args, facts["geometry"], facts["plan"].latents_at_once))
        problems += check_shapes(config, facts["geometry"])
    collect("device", "args.device", lambda: resolve_device(args))
    if "device" in facts:
        stated = config.model.get("precision")
        collect("dtype", "args", lambda: resolve_precision(args, stated, "" if for_card else facts["device"].type))
        for name in ("weights", "text_encoder_weights"):
            if (storage := getattr(args, name)) is not None:
                cure = f"install it, or remove args.{name}"
                problems += problems_of(f"args.{name}", cure, partial(require_usable, storage, facts["device"]))
    if {"geometry", "dtype"} <= facts.keys():
        problems += speed_problems(config, facts["geometry"], facts["device"], facts["dtype"])
    return facts, problems


def speed_problems(config: Config, geometry: Geometry, device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """Return the settings of speed that this network or device cannot have, in sampling or training."""
    args, network = config.args, params_of(config.model["network_config"])
    if not {"hidden_size", "num_attention_heads", "num_layers"} <= network.keys():
        return []  # reported when the network is built
    problems = []
    if args.attention is not None:
        head_dim = network["hidden_size"] // network["num_attention_heads"]
        training = config.mode == "train"
        check = partial(
            require_attention, args.attention, device=device, dtype=dtype, head_dim=head_dim, gradients=training
        )
        problems += problems_of("args.attention", "remove it, or give another", check)
    if args.step_cache is not None:
        shape = (network["hidden_size"], network["num_layers"], geometry.in_channels, geometry.patch_size[0])
        check = partial(StepCache, args.step_cache, default(args.step_cache_threshold, 0.0), shape)
        problems += problems_of("args.step_cache", "give another, or remove it", check)
    compiled = {
        "args.compile": args.compile,
        "model.first_stage_config.params.compile": params_of(config.model.get("first_stage_config")).get("compile"),
    }
    if any(compiled.values()) and (missing := _missing_compiler(device)) is not None:
        problems += [
            Problem(key, "", f"is true, and {missing[0]}", f"{missing[1]}, or set it to false")
            for key, value in compiled.items()
            if value
        ]
    return problems


def _missing_compiler(device: torch.device) -> tuple[str, str] | None:
    """Return what `torch.compile` lacks on this device, and the cure; it would tell at the first step."""
    if device.type != "cpu" and sys.platform == "darwin":
        return None  # its accelerators have a compiler of their own
    if device.type == "cpu":
        name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        missing, cure = f"the C++ compiler '{name}' is not found", "install it, or name another in the variable CXX"
        return None if shutil.which(name) else (missing, cure)
    if importlib.util.find_spec("triton") is None:
        return f"code for {device.type} is generated by the package triton, which is missing", "install it"
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if any(map(shutil.which, names)):
        return None
    missing = f"the C compiler that triton needs is not found ({' or '.join(names)})"
    return missing, "install one, or name another in the variable CC"


def dry_run(config: Config, *, for_card: bool = False) -> str:
    """Check a sampling run without reading weights, and describe it.

    Builds network and VAE on the meta device, which imports every class named in the YAML and runs its own checks.

    Args:
        config: of the run.
        for_card: allow the precisions of accelerators, also where this machine has none.

    Returns:
        A table: parameters, precision, frames and size of samples, and the legal frame counts and sizes.

    Raises:
        ConfigError: all problems.
    """
    facts, problems = _check_settings(config, for_card)
    problems += [*_missing_sections(config), *schedule_problems(config)]
    counts: dict[str, int] = {}
    for part, section in config.model.items():
        if isinstance(section, Mapping) and "target" in section and part != "conditioner_config":
            build = partial(_build, config, counts, part, section)
            weights = ", or give other weights (args.load, args.base)" if part == "network_config" else ""
            problems += problems_of(f"model.{part}", f"correct it in the model's YAML file{weights}", build)
    if problems:
        raise ConfigError(config.located(problems))
    return _report(config, facts, counts)


def schedule_problems(config: Config) -> Iterator[Problem]:
    """Yield the schedules that visit other noise levels than the denoiser's, which are those of the network."""
    denoiser, loss = params_of(config.model.get("denoiser_config")), params_of(config.model.get("loss_fn_config"))
    num, own = denoiser.get("num_idx"), _schedule(denoiser.get("discretization_config"))
    drawn = "loss_fn_config.params.sigma_sampler_config.params"
    places = {
        "sampler_config.params": params_of(config.model.get("sampler_config")),
        drawn: params_of(loss.get("sigma_sampler_config")),
    }
    if own is not None and num != len(own):
        cure = f"set it to {len(own)}"
        yield Problem("model.denoiser_config.params.num_idx", "", f"is {num}, and its schedule has {len(own)}", cure)
    if places[drawn].get("num_idx", num) != num:
        found = f"is {places[drawn]['num_idx']}, and that of the denoiser {num}"
        yield Problem(f"model.{drawn}.num_idx", "", found, "make both equal")
    for place, params in places.items():
        levels = _schedule(params.get("discretization_config"))
        if own is not None and levels is not None and (own.shape != levels.shape or abs(own - levels).max() > 1e-6):
            found = "gives other noise levels than model.denoiser_config.params.discretization_config"
            cure = "make both equal, as in the shipped model files: the network knows one schedule"
            yield Problem(f"model.{place}.discretization_config", "", found, cure)


def _schedule(section: Any) -> np.ndarray | None:
    """Return the noise levels of all timesteps; None for classes that do not say how many, or cannot be built."""
    try:
        built: Any = None if section is None else instantiate_from_config(section)
        return built(built.num_timesteps).numpy() if hasattr(built, "num_timesteps") else None
    except InputError:  # reported where the part is built
        return None


def _missing_sections(config: Config) -> Iterator[Problem]:
    """Yield missing sections that sampling needs."""
    needed = {"sampler_config": "to sample", "conditioner_config": "to read prompts"}
    if _needs_vae(config):
        needed["first_stage_config"] = "to turn latents into video, or images and videos into latents"
    for part, purpose in needed.items():
        if config.model.get(part) is None:
            cure = "take it from a shipped model configuration"
            yield Problem(f"model.{part}", "", f"is missing, and is needed {purpose}", cure)
    conditioner = config.model.get("conditioner_config")
    if conditioner is not None and not params_of(conditioner).get("emb_models"):
        path = "model.conditioner_config.params.emb_models"
        yield Problem(path, "", "is empty, so prompts cannot be encoded", "take it from a shipped model configuration")


def _build(config: Config, counts: dict[str, int], part: str, section: Mapping[str, Any]) -> None:
    """Build a part of the model (modules on the meta device), count parameters, and check names in its weights."""
    args = config.args
    large = part in ("network_config", "first_stage_config")
    with without_allocating() if large else contextlib.nullcontext():
        built: Any = instantiate_from_config(section)
    if large:
        counts[part] = sum(parameter.numel() for parameter in built.parameters())
    if part == "network_config":
        check_abilities(config, built)
    if part == "network_config" and args.load is not None and not problems_of("", "", partial(find_weights, args.load)):
        stack = stack_of(config)
        adapters = None if stack is None else stack.tensors()
        match_network(built, args.load, base=args.base, adapters=adapters, allow_missing_adapters=args.force_inference)
    elif part == "first_stage_config":
        check_memory_savers(config, built)
        if Path(str(built.ckpt_path)).is_file():
            match_autoencoder(built, built.ckpt_path, ignore_keys=built.ignore_keys)
    elif part == "sampler_config":
        check_sampler(args, built)


def check_sampler(args: SamplingArgs, sampler: Any) -> None:
    """Refuse settings that a sampler cannot follow, and warn of those of guidance without effect.

    Raises:
        ConfigError: the first of them.
        InputError: its schedule does not have as many steps as its section asks for.
    """
    if args.num_steps is None:
        sampler.timesteps(None)
    elif found := problems_of("args.num_steps", "give fewer steps", partial(sampler.timesteps, args.num_steps)):
        raise ConfigError(found)
    if args.video is not None:
        cure = "give more steps, or a larger strength"
        if found := problems_of(
            "args.strength", cure, partial(sampler.first_step, args.noise_strength, args.num_steps)
        ):
            raise ConfigError(found)
    if args.inversion is not None and not hasattr(sampler, "invert"):
        found = f"is given, and {type(sampler).__name__} has no method invert: its steps cannot be undone"
        cure = "set model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VideoDDIMSampler, or remove it"
        raise ConfigError([Problem("args.inversion", "", found, cure)])
    if not hasattr(sampler.guider, "scale"):
        for name in ("guidance_scale", "guidance_interval", "negative_prompt"):
            if (value := getattr(args, name)) not in (None, ""):
                found = f"is {spelled(value)}, but the sampler has no guidance"
                raise ConfigError([Problem(f"args.{name}", "", found, "remove it, or add a guider_config")])
    warn_once(logger, _guidance_warnings(args, sampler))


def _guidance_warnings(args: SamplingArgs, sampler: Any) -> Iterator[str]:
    """Yield the settings of guidance without effect: its scale is that of none, or no step is in its interval."""
    if not has_effect(sampler.guider, args.guidance_scale):
        scale = default(args.guidance_scale, getattr(sampler.guider, "scale", None))
        for name in ("negative_prompt", "guidance_interval"):
            if getattr(args, name) not in (None, ""):
                yield f"args.{name} has no effect: a guidance scale of {scale} is no guidance"
    elif args.guidance_interval is not None:
        num, (begin, end) = len(sampler.timesteps(args.num_steps)), args.guidance_interval
        first = 0 if args.video is None else sampler.first_step(args.noise_strength, args.num_steps)
        if not any(begin <= step / num < end for step in range(first, num)):
            yield (
                f"args.guidance_interval is {[begin, end]}, and holds none of the steps that run, which are at the "
                f"shares {first / num:g} to {(num - 1) / num:g}: there is no guidance"
            )


# Pixels of a frame above which ``vae_tiling: large`` decodes in tiles: those of the first generation are not.
LARGE_FRAME = 480 * 720


def check_memory_savers(config: Config, vae: Any) -> None:
    """Refuse tiling and slicing for a VAE that has no ``enable_tiling`` or ``enable_slicing``."""
    for name in ("tiling", "slicing"):
        if getattr(config.args, f"vae_{name}") and not hasattr(vae, f"enable_{name}"):
            value = spelled(getattr(config.args, f"vae_{name}"))
            found = f"is {value}, but {type(vae).__name__} has no method enable_{name}"
            raise ConfigError([Problem(f"args.vae_{name}", "", found, "set it to false, or add that method")])
    if config.args.vae_tiling == "large":
        _require_above(vae)


def _require_above(vae: Any) -> None:
    if "above" not in inspect.signature(vae.enable_tiling).parameters:
        found = f"is large, but enable_tiling of {type(vae).__name__} takes no number of pixels, above"
        raise ConfigError([Problem("args.vae_tiling", "", found, "set it to true or false, or add that parameter")])


def enable_memory_savers(vae: Any, args: SamplingArgs) -> None:
    """Enable tiling and slicing of a VAE as a sampling run does: slicing also if nothing is said of it."""
    if args.vae_tiling == "large" and hasattr(vae, "enable_tiling"):
        _require_above(vae)  # a preset that was chosen for a device may ask for it
        vae.enable_tiling(above=LARGE_FRAME)
    elif args.vae_tiling and hasattr(vae, "enable_tiling"):
        vae.enable_tiling()
    if default(args.vae_slicing, True) and hasattr(vae, "enable_slicing"):
        vae.enable_slicing()


def check_abilities(config: Config, network: Any) -> None:
    """Refuse settings for which a network of another class lacks a method, or does not name its blocks."""
    args = config.args
    for name in ("step_cache", "time_scaling"):
        if (value := getattr(args, name)) is not None and not hasattr(network, f"use_{name}"):
            found = f"is {value}, but {type(network).__name__} has no method use_{name}"
            raise ConfigError([Problem(f"args.{name}", "", found, "remove it, or add that method")])
    for name, value in {"weights": args.weights, "network_offload": args.network_offload}.items():
        if value in ("int8", "fp8", "nf4", "blocks") and not hasattr(network, "blocks"):
            found = f"is {value}, but {type(network).__name__} has no property blocks"
            raise ConfigError([Problem(f"args.{name}", "", found, "remove it, or add that property")])


def _report(config: Config, facts: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    geometry, plan, args = facts["geometry"], facts["plan"], config.args
    network, sampler = params_of(config.model["network_config"]), params_of(config.model.get("sampler_config"))
    guidance = default(args.guidance_scale, params_of(sampler.get("guider_config")).get("scale"))
    size = "the image's shape" if plan.size is None else f"{plan.size[0]}x{plan.size[1]}"
    steps, most = geometry.size_steps, geometry.max_size
    legal_sizes = f"height multiples of {steps[0]} up to {most[0]}, width multiples of {steps[1]} up to {most[1]}"
    info = read_adapter_info(args.load) if args.load else None
    stack = stack_of(config)
    lora = {} if stack is None else {f"LoRA {number}": row for number, row in enumerate(stack.rows())}
    if info is not None:
        size = f"rank {info.rank}, alpha {info.alpha:g}, {len(info.layers)} of {network['num_layers']} layers"
        lora[TITLES[info.kind]] = f"{size}; trained on {default(args.base, info.base)}"
    rows = {
        "configuration": f"{' + '.join(config.bases)} (digest {config.digest[:12]})",
        "weights": str(find_weights(args.load)) if args.load else "none",
        **lora,
        "network": f"{counts['network_config']:,} parameters, {network['num_layers']} layers, "
        f"hidden size {network['hidden_size']}, {geometry.positions} positions",
        "VAE": f"{counts['first_stage_config']:,} parameters" if "first_stage_config" in counts else "none",
        "precision": f"{precision_name(facts['dtype'])} on {facts['device']}",
        **cudnn_row(facts["dtype"], facts["device"]),
        "task": ("image to video" if plan.image2video else "text to video")
        + (", with a control" if geometry.control_channels else ""),
        "sample": f"{plan.video_frames} frames{' in a loop' * plan.loop} ({plan.latents} latent) of {size} "
        f"at {plan.fps} fps, "
        f"{plan.seconds:.1f} s",
        **_window_row(plan),
        "sampler": f"{args.num_steps or sampler.get('num_steps')} steps, guidance {guidance}",
        "legal frames": f"{listed_numbers(geometry.legal_frames())} "
        f"({listed_numbers(geometry.legal_latents())} latent frames)",
        "legal sizes": f"{most[0]}x{most[1]} only" if geometry.fixed_size else legal_sizes,
        "results": args.output_dir,
    }
    return as_table(rows)


def _window_row(plan: SamplingPlan) -> dict[str, str]:
    windows = plan.windows
    if windows is None or plan.padded_latents <= windows.length:
        return {}
    num = len(windows.starts(plan.padded_latents))
    return {"windows": f"{num} of {windows.length} latent frames, {windows.overlap} shared with the next"}


def cudnn_row(dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Return a row about a faulty cuDNN for a network in `dtype` on `device`; none if it is right."""
    warnings = conv3d_warnings(autoencoder_dtype(dtype), device)
    return {"warning": "; ".join(warnings)} if warnings else {}


def as_table(rows: Mapping[str, str]) -> str:
    """Format the rows of a report, name → text, in two columns."""
    return "\n".join(f"{name:<13}  {text}" for name, text in rows.items())
