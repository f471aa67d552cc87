"""In which precision, and on which device, a run computes."""

from typing import Literal

import torch

import sgm.distributed
from sgm.config import ConfigError, Problem, SamplingArgs
from sgm.util import PRECISIONS

Precision = Literal["fp16", "bf16", "fp32"]


def resolve_precision(args: SamplingArgs, model_precision: Precision | None, device_type: str) -> torch.dtype:
    """Decide in which precision the network runs.

    The model's precision holds unless a flag says otherwise. ``fp16: true`` and ``bf16: true`` must agree with it; a
    model released in fp32 may also run in bf16, which has the range of fp32. A false flag for the model's own
    precision asks for fp32, which every model can do. Without any statement it is fp32.

    Args:
        args: with the flags.
        model_precision: ``model.precision``.
        device_type: such as ``torch.device.type``.

    Raises:
        ConfigError: the flags contradict each other or the model, or the device cannot do it.
    """
    if model_precision not in (None, *PRECISIONS):
        cure = f"give one of {', '.join(PRECISIONS)}, or null"
        raise ConfigError([Problem("model.precision", "", f"is {model_precision!r}", cure)])
    flags = {"fp16": args.fp16, "bf16": args.bf16}
    chosen = [name for name, flag in flags.items() if flag]
    if len(chosen) > 1:
        cure = f"keep args.{model_precision if model_precision in flags else 'bf16'}=true only"
        raise ConfigError([Problem("args.fp16", "", "fp16 and bf16 are both true", cure)])
    precision = chosen[0] if chosen else model_precision or "fp32"
    if not chosen and flags.get(precision) is False:
        precision = "fp32"
    if model_precision is not None and precision not in (model_precision, "fp32"):
        if (model_precision, precision) != ("fp32", "bf16"):
            why = (
                "values beyond fp16's range turn into black video"
                if precision == "fp16"
                else "bf16's coarser mantissa is visible in its videos"
            )
            found = f"asks for {precision}, but the model was released in {model_precision}: {why}"
            cure = f"remove args.{precision} (null follows the model)"
            raise ConfigError([Problem(f"args.{precision}", "", found, cure)])
    if precision == "fp16" and device_type == "cpu":
        found = "the network would run in fp16, which a CPU cannot do"
        cure = "set args.fp16=false to run in fp32, or use an accelerator"
        raise ConfigError([Problem("args.fp16", "", found, cure)])
    return PRECISIONS[precision]


def resolve_device(args: SamplingArgs) -> torch.device:
    """Return the device of this process.

    Raises:
        ConfigError: ``args.device`` names one that is not there.
    """
    if args.device is None:
        return sgm.distributed.device()
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = f"'{args.device}' cannot be used: {(str(error).splitlines() or ['no reason given'])[0]}"
        cure = "remove args.device to take what this machine has, or set args.device=cpu"
        raise ConfigError([Problem("args.device", "", found, cure)]) from error
    return device


def precision_name(dtype: torch.dtype) -> str:
    """Return the name that YAML files have for `dtype`."""
    return next(name for name, value in PRECISIONS.items() if value is dtype)
