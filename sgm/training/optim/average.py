"""Moving averages of the weights (EMA) for any optimizer, and the weights that an optimizer means to be used.

The average is part of the optimizer state, so DeepSpeed shards, offloads, saves and loads it with the moments, at every
ZeRO stage.
"""

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sgm.distributed
from sgm.util import InputError


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Let an optimizer keep a moving average of its weights.

    The n-th update of a parameter p (n = 1, 2, ...) is followed by

        ema ← d·ema + (1 − d)·p,   d = min(decay, (1 + n) / (10 + n)),

    where ema starts as p before its first update. ``state[p]["ema"]`` has the shape of p and is float32. Of a
    schedule-free optimizer, whose parameters lie between its average and its iterates, p is the average.

    Args:
        optimizer: any one whose `step` updates the parameters that have a gradient.
        decay: largest d, in (0, 1).

    Raises:
        InputError: `decay` is out of its range. The step: a parameter is not float32.
    """
    if not 0 < decay < 1:
        raise InputError(f"args.ema_decay: {decay}; it lies between 0 and 1, e.g. 0.9999")
    initial: dict[Tensor, Tensor] = {}

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Stored after the step: optimizers initialize a state only if it is empty, and a closure makes gradients in it.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        initial.update((p, _initial_average(p)) for p in parameters if "ema" not in optimizer.state.get(p, ()))

    @torch.no_grad()
    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        updated = [(group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for group, p in updated:
            state = optimizer.state[p]
            if p in initial:
                state["ema"], n = initial[p], 1
            else:  # states of earlier versions have only the count of AdamW, which is n
                n = state["ema_updates"] + 1 if "ema_updates" in state else int(state["step"])
            state["ema_updates"] = n
            state["ema"].lerp_(_evaluated(group, p, state), max(1 - decay, 9 / (10 + n)))
        initial.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _evaluated(group: dict[str, Any], parameter: Tensor, state: dict[str, Any]) -> Tensor:
    """Return the parameter that is evaluated: itself, or the average in a schedule-free optimizer."""
    if not group.get("train_mode"):
        return parameter.detach()
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    return parameter.detach().lerp(state["z"], 1 - 1 / beta)


def _initial_average(parameter: Tensor) -> Tensor:
    if parameter.dtype != torch.float32:
        raise InputError(
            f"args.ema_decay averages float32 weights, but DeepSpeed optimizes {parameter.dtype} ones; let it keep "
            "float32 copies (no bf16_master_weights_and_grads in its section), or set args.ema_decay: null"
        )
    return parameter.detach().clone()


@contextlib.contextmanager
def evaluation_weights(engine: Any) -> Iterator[None]:
    """Context in which the network has the weights to evaluate and save; after it, those to train, bit by bit.

    A schedule-free optimizer trains at points between its average and its iterates, and the average is the result.
    With others they are the same. Collective: all ranks enter it.
    """
    optimizer = engine.optimizer
    base = inside(optimizer)
    if not callable(getattr(base, "eval", None)):
        yield
        return
    parameters = [p for group in base.param_groups for p in group["params"]]
    trained = [p.detach().to("cpu", copy=True) for p in parameters]  # going back by formula would round
    base.eval()
    _copy_to_network(optimizer)
    try:
        yield
    finally:
        base.train()
        for p, value in zip(parameters, trained, strict=True):
            p.data.copy_(value)
        _copy_to_network(optimizer)


@contextlib.contextmanager
def average_kept(engine: Any) -> Iterator[None]:
    """Context in which the settings of an optimizer may change that say where a schedule-free one trains.

    Its average and its iterates stay, and the point between them moves. Collective: all ranks enter it.
    """
    base = inside(engine.optimizer)
    has_points = callable(getattr(base, "eval", None))
    if has_points:
        base.eval()
    yield
    if has_points:
        base.train()
        _copy_to_network(engine.optimizer)


@torch.no_grad()
def _copy_to_network(optimizer: Any) -> None:
    """Copy the float32 weights of a DeepSpeed optimizer into the network, where it keeps any of its own."""
    if has_master_copies(optimizer):
        for low, high in _master_copies(optimizer):
            low.copy_(high)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def inside(optimizer: Any) -> Any:
    """Return the optimizer inside one of DeepSpeed's, which has parameter groups and settings; others as they are."""
    return getattr(optimizer, "optimizer", optimizer)


def has_master_copies(optimizer: Any) -> bool:
    """Whether this is DeepSpeed's wrapper for 16 bits without ZeRO, which holds float32 master copies."""
    return type(optimizer).__name__ == "FP16_UnfusedOptimizer"


def _master_copies(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(low, high, strict=True)


def full_ema(engine: Any, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Gather the averages of the trained parameters of an optimizer in a DeepSpeed engine, at any ZeRO stage.

    Collective: all ranks call it.

    Returns:
        Name → average (the parameter itself before its first update), float32 on the CPU, on rank zero and the other
        ranks of its tensor-parallel group; empty elsewhere.
    """
    optimizer = engine.optimizer
    base = inside(optimizer)
    averages: dict[str, Tensor] = {}
    masters = dict(_master_copies(optimizer)) if has_master_copies(optimizer) else {}
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


def _gather_full(parameter: nn.Parameter, key: str | None) -> Tensor:
    """All-gather a parameter's optimizer state `key`, or without `key` its float32 values."""
    utils = importlib.import_module("deepspeed.utils")  # lazy: DeepSpeed selects its device on import
    if key is None:
        return utils.safe_get_full_fp32_param(parameter)
    return utils.safe_get_full_optimizer_state(parameter, key)
