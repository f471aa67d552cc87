"""Optimizers by name, parameter groups for weight decay, and AdamW with a moving average of the weights (EMA).

The average is part of the optimizer state, so DeepSpeed shards, offloads, saves and loads it with the moments, at every
ZeRO stage.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

import sgm.distributed
from sgm.util import InputError, get_obj_from_str, nearest

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class EmaAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2) with an optional moving average of the weights.

    The n-th update of a parameter p (n = 1, 2, ...) is followed by

        ema ← d·ema + (1 − d)·p,   d = min(ema_decay, (1 + n) / (10 + n)),

    where ema starts as p before its first update. ``state[p]["ema"]`` has the shape of p and is float32.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment per update, each in [0, 1).
        eps: added to the square root of the second moment.
        weight_decay: times lr, the fraction of a weight that each update subtracts.
        ema_decay: largest d, in (0, 1); None for no average.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ema_decay: float | None = None,
    ) -> None:
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"Invalid ema_decay: {ema_decay}; it lies between 0 and 1, e.g. 0.9999")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.ema_decay = ema_decay
        for group in self.param_groups:
            group["fused"] = all(_has_fused_kernel(p.device) for p in group["params"]) or None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters that have a gradient, and their averages.

        Raises:
            InputError: a parameter to average is not float32.
        """
        loss = None if closure is None else closure()
        if self.ema_decay is None:
            super().step()
            return loss
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # Stored after AdamW's step, which initializes a state only if it is empty.
        initial = {p: _initial_ema(p) for p in updated if "ema" not in self.state.get(p, ())}
        super().step()
        for p, ema in initial.items():
            self.state[p]["ema"] = ema
        states = [self.state[p] for p in updated]
        # 1 − d as a tensor: reading the step of a fused kernel would synchronize the device.
        weights = [(9 / (10 + state["step"])).clamp(min=1 - self.ema_decay).to(state["ema"].device) for state in states]
        averages = [state["ema"] for state in states]
        torch._foreach_lerp_(averages, [p.detach() for p in updated], weights)  # pyright: ignore[reportPrivateImportUsage]
        return loss


def _initial_ema(parameter: Tensor) -> Tensor:
    if parameter.dtype != torch.float32:
        raise InputError(
            f"args.ema_decay averages float32 weights, but DeepSpeed optimizes {parameter.dtype} ones; let it keep "
            "float32 copies (no bf16_master_weights_and_grads in its section), or set args.ema_decay: null"
        )
    return parameter.detach().clone()


@functools.cache
def _has_fused_kernel(device: torch.device) -> bool:
    """Whether AdamW has a fused kernel for `device`, found by trying, since torch's list of devices is private."""
    weight, gradient, mean, square = ([torch.zeros(1, device=device)] for _ in range(4))
    state = mean, square, [], [torch.zeros((), device=device)]
    choices: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False}
    try:  # the function, since an optimizer's step imports torch's compiler
        adamw(weight, gradient, *state, beta1=0.9, beta2=0.999, lr=1e-3, weight_decay=0.0, eps=1e-8, **choices)
    except RuntimeError:  # includes NotImplementedError, raised without the kernel
        return False
    return True


# SAT's FusedEmaAdam compiles a CUDA extension at its first use; EmaAdamW has the same update rule.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sat.ops.FusedEmaAdam": EmaAdamW,
    "sat.ops.fused_ema_adam.FusedEmaAdam": EmaAdamW,
    "FusedEmaAdam": EmaAdamW,
    "AdamW": EmaAdamW,
    "FusedAdam": EmaAdamW,
    "Adam": torch.optim.Adam,
}


def resolve_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """Return an optimizer class by its key in `OPTIMIZERS` or its dotted path.

    Raises:
        InputError: the name is unknown, or the class is no torch optimizer.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if "." not in name:
        raise InputError(
            f"deepspeed.optimizer.type: unknown optimizer '{name}'{nearest(name, list(OPTIMIZERS))}; known are "
            f"{', '.join(OPTIMIZERS)}, and the dotted path of any other, e.g. torch.optim.SGD"
        )
    try:
        found = get_obj_from_str(name)
    except InputError as error:
        raise InputError(f"deepspeed.optimizer.type: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise InputError(
            f"deepspeed.optimizer.type: '{name}' is not a subclass of torch.optim.Optimizer; give one, e.g. AdamW"
        )
    return found


def make_optimizer(
    section: Mapping[str, Any],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    ema_decay: float | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of a ``{type: ..., params: {...}}`` section.

    Frozen parameters are ignored. Weight decay applies to parameters with more than one axis, not to biases and norms.

    Raises:
        InputError: the type is unknown, or refuses a parameter.
    """
    name, params = section["type"], dict(section.get("params") or {})
    cls = resolve_optimizer(name)
    if "ema_decay" in params:
        raise InputError("deepspeed.optimizer.params.ema_decay is not supported; set args.ema_decay instead")
    known = inspect.signature(cls).parameters
    if ema_decay is not None:
        if "ema_decay" not in known:
            raise InputError(
                f"args.ema_decay: the optimizer '{name}' keeps no average; set deepspeed.optimizer.type: AdamW, or "
                "args.ema_decay: null"
            )
        params["ema_decay"] = ema_decay
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        valid = [key for key in known if key not in ("params", "ema_decay")]
        for key in params.keys() - known.keys():
            raise InputError(
                f"deepspeed.optimizer.params.{key}: '{name}' has no such parameter{nearest(key, valid)}; "
                f"it takes {', '.join(valid)}"
            )
    try:
        return cls(_decay_groups(named_parameters), **params)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        raise InputError(f"deepspeed.optimizer: '{name}' refuses its parameters {params}: {error}") from error


def _decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Return the parameter groups with and without weight decay; omit empty ones."""
    decay, no_decay = [], []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves sharded parameters empty
            (decay if len(shape) > 1 else no_decay).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def discard_initial_update(engine: Any) -> None:
    """Undo the update with zero gradients that ``deepspeed.initialize`` makes in 16 bits without ZeRO.

    That update decays the weights and counts in bias correction and average. Call this before loading a state.
    """
    if _has_master_copies(engine.optimizer):
        engine.optimizer.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()


def full_ema(engine: Any, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Gather the averages of the trained parameters from an `EmaAdamW` in a DeepSpeed engine, at any ZeRO stage.

    Collective: all ranks call it.

    Returns:
        Name → average (the parameter itself before its first update), float32 on the CPU, on rank zero and the other
        ranks of its tensor-parallel group; empty elsewhere.
    """
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    averages: dict[str, Tensor] = {}
    masters = {}
    if _has_master_copies(optimizer):
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters.update(zip(low, high, strict=True))
    started = any("ema" in state for state in base.state.values())
    if hasattr(optimizer, "round_robin_bit16_groups"):
        # DeepSpeed links parameters to its flat buffers in the order before round_robin_gradients; link them again.
        plain, optimizer.bit16_groups = optimizer.bit16_groups, optimizer.round_robin_bit16_groups
        optimizer._link_all_hp_params()
        optimizer.bit16_groups = plain
    if started and hasattr(optimizer, "_hp_optimizer_states_linked"):
        # ZeRO 1 and 2 link parameters to their state only once, in the first group's first step, before the states of
        # other groups exist, and not again after loading.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() > 0:
            average = _gather_full(parameter, "ema" if started else None)
        else:
            master = masters.get(parameter, parameter)
            average = base.state.get(master, {}).get("ema", master)
        if engine.global_rank < sgm.distributed.tensor_parallel_size():
            averages[name] = average.detach().to("cpu", torch.float32, copy=True)
    return averages


def _has_master_copies(optimizer: Any) -> bool:
    """Whether this is DeepSpeed's wrapper for 16 bits without ZeRO, which holds float32 master copies."""
    return type(optimizer).__name__ == "FP16_UnfusedOptimizer"


def _gather_full(parameter: nn.Parameter, key: str | None) -> Tensor:
    """All-gather a parameter's optimizer state `key`, or without `key` its float32 values."""
    utils = importlib.import_module("deepspeed.utils")  # lazy: DeepSpeed selects its device on import
    if key is None:
        return utils.safe_get_full_fp32_param(parameter)
    return utils.safe_get_full_optimizer_state(parameter, key)
