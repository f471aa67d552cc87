"""Learning rate schedule: linear warmup, then a decay."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from sgm.config.args import TrainingArgs
from sgm.util import default

DecayStyle = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "exponential"]
AUTO_WARMUP_FACTOR = 0.05
_UNFINISHED = 0.05  # of the rate, above the end of its decay, with which a run may end without a word
AUTO_WARMUP_ITERS = {"finetune": 100, "pretrain": 0}  # by args.mode, if args.auto_warmup_iters is null


@dataclass(frozen=True)
class Decay:
    """Settings of a decay: the final factor, the exponent of `polynomial`, the cycles of `cosine_with_restarts`."""

    ratio: float
    power: float
    cycles: int


def linear(progress: float, decay: Decay) -> float:
    """From 1 to 0; the ratio has no effect."""
    return 1 - progress


def cosine(progress: float, decay: Decay) -> float:
    """From 1 to the ratio along half a cosine (Loshchilov and Hutter, arXiv:1608.03983)."""
    return decay.ratio + (1 - decay.ratio) * (1 + math.cos(math.pi * progress)) / 2


def cosine_with_restarts(progress: float, decay: Decay) -> float:
    """Cycles of `cosine`, each from 1 again; the ratio after the last."""
    return cosine(progress * decay.cycles % 1 if progress < 1 else 1, decay)


def polynomial(progress: float, decay: Decay) -> float:
    """From 1 to the ratio along a power of what is left of the run."""
    return decay.ratio + (1 - decay.ratio) * (1 - progress) ** decay.power


def exponential(progress: float, decay: Decay) -> float:
    """From 1 to the ratio, exponentially."""
    return decay.ratio**progress


def constant(progress: float, decay: Decay) -> float:
    """Always 1."""
    return 1.0


DECAYS: Mapping[DecayStyle, Callable[[float, Decay], float]] = {
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "exponential": exponential,
    "constant": constant,
}


def lr_factor(
    iteration: int,
    *,
    train_iters: int,
    decay_style: DecayStyle = "linear",
    decay_iters: int | None = None,
    decay_ratio: float = 0.1,
    power: float = 1.0,
    cycles: int = 1,
    warmup: float = 0.01,
    auto_warmup_iters: int = 0,
) -> float:
    """Return the learning rate of one update as a factor of the base rate.

    It rises linearly during the warmup. Then the progress of the decay is the number of updates since the warmup
    divided by `decay_iters`, at most 1. So a run of `decay_iters` updates ends slightly above the final value, as in
    the reference implementation.

    Args:
        iteration: number of the update, from 1.
        train_iters: updates in the run.
        decay_style: a key of `DECAYS`.
        decay_iters: iterations of the decay; None for `train_iters`.
        decay_ratio: final factor of all decays but the linear and constant ones, in (0, 1].
        power: exponent of the polynomial decay, above 0.
        cycles: of the cosine with restarts.
        warmup: length of the warmup: up to 1, a fraction of `decay_iters`; above 1, a number of updates.
        auto_warmup_iters: number of first iterations with a factor of at most 0.05.
    """
    decay_iters = train_iters if decay_iters is None else decay_iters
    warmup_iters = warmup_iterations(warmup, decay_iters)
    if iteration <= warmup_iters:
        factor = iteration / warmup_iters
    else:
        decay = Decay(decay_ratio, power, cycles)
        factor = DECAYS[decay_style](min(1.0, (iteration - warmup_iters) / decay_iters), decay)
    return min(factor, AUTO_WARMUP_FACTOR) if iteration <= auto_warmup_iters else factor


def warmup_iterations(warmup: float, decay_iters: int) -> float:
    """Return the number of updates of a warmup; arguments as of `lr_factor`."""
    return warmup if warmup > 1 else warmup * decay_iters


def endless_warmup(args: TrainingArgs, total: int) -> str | None:
    """Return what is to be said of a run of `total` iterations that ends within its warmup; None for others."""
    auto = default(args.auto_warmup_iters, AUTO_WARMUP_ITERS[args.mode])
    if auto >= total:
        null = " if null" if args.auto_warmup_iters is None else ""
        return (
            f"args.auto_warmup_iters is {auto}{null}, and the run has {total} iterations: none has more than "
            f"{AUTO_WARMUP_FACTOR:.0%} of the learning rate; set args.auto_warmup_iters=0"
        )
    steps = warmup_iterations(args.warmup, default(args.lr_decay_iters, total))
    if steps > total:
        return (
            f"args.warmup is {args.warmup:g}: {steps:g} iterations, and the run has {total}: none has more than "
            f"{total / steps:.0%} of the learning rate; set args.warmup to less, such as 0.05"
        )
    return None


def factors_of(args: TrainingArgs, total: int) -> Callable[[int], float]:
    """Return number of the update → factor of the learning rate in a run of `total` iterations."""
    return partial(
        lr_factor,
        train_iters=total,
        decay_style=args.lr_decay_style,
        decay_iters=args.lr_decay_iters,
        decay_ratio=args.lr_decay_ratio,
        power=args.lr_power,
        cycles=args.lr_cycles,
        warmup=args.warmup,
        auto_warmup_iters=default(args.auto_warmup_iters, AUTO_WARMUP_ITERS[args.mode]),
    )


def unfinished_decay(args: TrainingArgs, total: int) -> str | None:
    """Return what is to be said of a run of `total` iterations with the default decay that ends well before its end."""
    if args.lr_decay_iters is not None or args.lr_decay_style == "constant":
        return None
    steps = warmup_iterations(args.warmup, total)
    factor = factors_of(replace(args, auto_warmup_iters=0), total)
    last, end = factor(total), factor(3 * total)
    if steps >= total or last - end <= _UNFINISHED:
        return None
    iterations = total - steps if args.warmup > 1 else total / (1 + args.warmup)
    return (
        f"args.lr_decay_iters is null: the decay takes {total} iterations after {steps:g} of warm-up, so the last one "
        f"has {last:.0%} of the learning rate, and the decay would end at {end:.0%}; args.lr_decay_iters="
        f"{max(1, int(iterations))} ends it with the run"
    )


class LearningRate(LambdaLR):
    """Set the rates of an optimizer to base rate × factor; used as DeepSpeed's ``lr_scheduler``.

    The optimizer always has the rates of the next update. DeepSpeed does not call `step` for a skipped update. Unlike
    `LambdaLR`, loading a state restores only the number of updates, so a resumed run follows its own configuration.

    `factor` maps the number of the update, from 1, to the factor: `lr_factor` with its settings bound.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        super().__init__(optimizer, lambda updates: factor(updates + 1))

    def get_last_lr(self) -> list[float]:
        """Return the rate of each group, as numbers."""
        return [float(lr) for lr in self._last_lr]

    def state_dict(self) -> dict[str, int]:
        """Return the number of updates made."""
        return {"iteration": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the number of updates and the rates of the next one, replacing those of the optimizer."""
        self.last_epoch = state_dict["iteration"]
        self._last_lr = [lr * self.lr_lambdas[0](self.last_epoch) for lr in self.base_lrs]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], torch.Tensor):  # as in torchao; compiled updates hold on to it
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
