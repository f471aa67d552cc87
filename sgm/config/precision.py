"""Resolve the precision of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from sgm.config.args import SamplingArgs
from sgm.config.load import Config, ConfigError, Problem
from sgm.util import PRECISIONS

Precision = Literal["fp16", "bf16", "fp32"]


@dataclass(frozen=True)
class _Flag:
    """Value of a precision flag (None: not set), and its key."""

    path: str
    value: bool | None


def resolve_precision(args: SamplingArgs, model_precision: Precision | None, device_type: str) -> torch.dtype:
    """Return the dtype of the network.

    It is the model's unless a flag differs. ``fp16: true`` and ``bf16: true`` must agree with the model; a model
    released in fp32 may also run in bf16, which has the same range. A false flag for the model's precision selects
    fp32, which works for every model. Without flags and ``model.precision`` it is fp32.

    Args:
        args: with the flags.
        model_precision: ``model.precision``.
        device_type: such as ``torch.device.type``.

    Raises:
        ConfigError: the flags contradict each other or the model, or the device does not support it.
    """
    flags = {name: _Flag(f"args.{name}", getattr(args, name)) for name in ("fp16", "bf16")}
    return _resolve(flags, model_precision, device_type)


def resolve_training_precision(config: Config, device_type: str) -> torch.dtype:
    """Return the dtype of the network in training, with the rules of `resolve_precision`.

    ``deepspeed.fp16.enabled`` and ``deepspeed.bf16.enabled`` are equivalent to ``args.fp16`` and ``args.bf16``.

    Raises:
        ConfigError: the flags contradict each other or the model, or the device does not support it.
    """
    flags = {}
    for name in ("fp16", "bf16"):
        enabled = (config.deepspeed.get(name) or {}).get("enabled")
        stated = [_Flag(f"args.{name}", getattr(config.args, name)), _Flag(f"deepspeed.{name}.enabled", enabled)]
        given = [flag for flag in stated if flag.value is not None]
        if len({flag.value for flag in given}) > 1:
            first, second = (f"{flag.path} is {str(flag.value).lower()}" for flag in given)
            raise _refusal(given[0].path, f"{first}, but {second}", f"remove {given[1].path}, or make them equal")
        flags[name] = (given or stated)[0]
    return _resolve(flags, config.model.get("precision"), device_type)


def _resolve(flags: Mapping[str, _Flag], model_precision: Precision | None, device_type: str) -> torch.dtype:
    if model_precision not in (None, *PRECISIONS):
        raise _refusal("model.precision", f"is {model_precision!r}", f"give one of {', '.join(PRECISIONS)}, or null")
    chosen = [name for name, flag in flags.items() if flag.value]
    if len(chosen) > 1:
        keep = flags.get(model_precision or "", flags["bf16"])
        raise _refusal(flags["fp16"].path, "fp16 and bf16 are both true", f"keep {keep.path}=true only")
    precision = chosen[0] if chosen else model_precision or "fp32"
    if not chosen and precision in flags and flags[precision].value is False:
        precision = "fp32"
    if (
        model_precision not in (None, precision)
        and precision != "fp32"
        and (model_precision, precision) != ("fp32", "bf16")
    ):
        why = {"fp16": "values beyond fp16's range give black video", "bf16": "bf16's coarser mantissa is visible"}
        found = f"asks for {precision}, but the model was released in {model_precision}: {why[precision]}"
        raise _refusal(flags[precision].path, found, f"remove {flags[precision].path} (null follows the model)")
    if precision == "fp16" and device_type == "cpu":
        path, found = flags["fp16"].path, "the network would run in fp16, which a CPU cannot do"
        raise _refusal(path, found, f"set {path}=false to run in fp32, or use an accelerator")
    return PRECISIONS[precision]


def _refusal(path: str, found: str, cure: str) -> ConfigError:
    return ConfigError([Problem(path, "", found, cure)])


def autoencoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the autoencoder for a network of `dtype`; the autoencoder overflows in float16."""
    return torch.bfloat16 if dtype is torch.float16 else dtype


def precision_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` in YAML files."""
    return next(name for name, value in PRECISIONS.items() if value is dtype)


def conv3d_fault(cudnn: int | None, dtype: torch.dtype) -> str | None:
    """Return what is wrong with 3D convolutions of the autoencoder in this version of cuDNN; None if nothing is.

    cuDNN 9.8 to 9.14 gives wrong results in half precision (pytorch/pytorch#163539). PyTorch before 2.9 uses it all
    the same; PyTorch 2.9 goes around it, with several times the memory and a quarter of the speed
    (pytorch/pytorch#166643, #166122). cuDNN 9.15 is right (pytorch/pytorch#166480).

    Args:
        cudnn: ``torch.backends.cudnn.version()``, such as 91002 for 9.10.2; None without cuDNN.
        dtype: of the autoencoder.
    """
    if cudnn is None or dtype is torch.float32 or not 90800 <= cudnn < 91500:
        return None
    version = f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    return (
        f"cuDNN {version} computes 3D convolutions in half precision wrongly, or PyTorch goes around it with much more "
        "memory and time; install cuDNN 9.15 or newer (package nvidia-cudnn-cu12 or -cu13) with PyTorch 2.9.1 or newer"
    )


def conv3d_warnings(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Return `conv3d_fault` of the installed cuDNN for an autoencoder on `device`, if there is one."""
    fault = conv3d_fault(torch.backends.cudnn.version(), dtype) if device.type != "cpu" else None
    return [] if fault is None else [fault]
