"""The learning rate: warmup, then one of four decays."""

import math
from typing import Any, Literal

import torch

DecayStyle = Literal["linear", "cosine", "constant", "exponential"]

# The share of the learning rate at which the first iterations of a fine-tuning run.
AUTO_WARMUP_SHARE = 0.05


def lr_at(
    iteration: int,
    *,
    base_lr: float,
    train_iters: int,
    decay_style: DecayStyle = "linear",
    decay_iters: int | None = None,
    decay_ratio: float = 0.1,
    warmup: float = 0.01,
    auto_warmup_iters: int = 0,
) -> float:
    """Return the learning rate of one update.

    It rises linearly during the warmup, and then falls with s, the number of updates since the warmup as a share of
    `decay_iters`, at most 1: linear, 1 − s; cosine, from 1 to `decay_ratio`; exponential, decay_ratio^s; constant, 1.
    Since s reaches 1 as many iterations after `decay_iters` as the warmup took, a run ends slightly above the final
    value, as with the reference implementation.

    Args:
        iteration: number of the update, from 1.
        base_lr: the learning rate at the end of the warmup.
        train_iters: updates in the run.
        decay_style: how it falls.
        decay_iters: iterations over which it falls; None for `train_iters`.
        decay_ratio: final value of the cosine and exponential decays, as a share of `base_lr`, in (0, 1].
        warmup: length of the warmup as a share of `decay_iters`, in [0, 1].
        auto_warmup_iters: the first so many iterations run at no more than 5 % of `base_lr`.
    """
    decay_iters = train_iters if decay_iters is None else decay_iters
    warmup_iters = warmup * decay_iters
    if iteration <= warmup_iters:
        share = iteration / warmup_iters
    else:
        progress = min(1.0, (iteration - warmup_iters) / decay_iters)
        match decay_style:
            case "linear":
                share = 1 - progress
            case "cosine":
                share = decay_ratio + (1 - decay_ratio) * (1 + math.cos(math.pi * progress)) / 2
            case "exponential":
                share = decay_ratio**progress
            case "constant":
                share = 1.0
    if iteration <= auto_warmup_iters:
        share = min(share, AUTO_WARMUP_SHARE)
    return base_lr * share


class LearningRate:
    """Keeps an optimizer's learning rates at `lr_at`; DeepSpeed takes it as its ``lr_scheduler``.

    At construction the optimizer gets the rates of the first update, and after each update, with `step`, those of the
    next. DeepSpeed leaves `step` out where it skips an update. Every parameter group falls from a rate of its own: the
    one that it had at construction.

    Args:
        optimizer: its groups hold the base learning rates; for all other parameters see `lr_at`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        train_iters: int,
        decay_style: DecayStyle = "linear",
        decay_iters: int | None = None,
        decay_ratio: float = 0.1,
        warmup: float = 0.01,
        auto_warmup_iters: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.iteration = 0  # updates made so far
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._settings: dict[str, Any] = {
            "train_iters": train_iters,
            "decay_style": decay_style,
            "decay_iters": decay_iters,
            "decay_ratio": decay_ratio,
            "warmup": warmup,
            "auto_warmup_iters": auto_warmup_iters,
        }
        self._apply()

    def _apply(self) -> None:
        for group, base_lr in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr_at(self.iteration + 1, base_lr=base_lr, **self._settings)

    def step(self) -> None:
        """Go on to the next update."""
        self.iteration += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """Return the rate of each group: that of the coming update."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        """Return the number of updates made; the rates follow from it and the configuration."""
        return {"iteration": self.iteration}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to the update after those of `state_dict`, whatever rates the optimizer has been given since."""
        self.iteration = state_dict["iteration"]
        self._apply()
