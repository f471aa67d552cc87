"""Sigma sampling: draw the noise levels of a training step."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from sgm.config.values import AtLeast0, Positive
from sgm.modules.diffusionmodules.discretizer import Levels, LevelTable
from sgm.util import InputError, default


class DiscreteSampling:
    """Timesteps drawn uniformly or from another distribution, mapped to noise levels by a table.

    With `uniform_sampling`, data-parallel ranks draw from different parts of the schedule, so that each optimizer
    step sees all of it: the ranks form groups, and group g of G draws from the shares [g, g + 1) / G of the
    distribution: uniformly, from the timesteps [g, g + 1) · num_idx / G.

    Args:
        discretization_config: how the table is computed, see `discretizer`.
        num_idx: timesteps.
        flip: timestep 0 is the cleanest level.
        uniform_sampling: spread the ranks over the schedule.
        group_num: groups with `uniform_sampling`; 0 for one per rank. Never more than ranks.
        distribution: ``uniform``, or ``logit_normal`` (Esser et al. 2024, section 3.1): t = num_idx · sigmoid(n) for a
            normal number n, so that middle timesteps are drawn more often than the ends.
        location: mean of n; above 0 favours noisy timesteps. None is 0.
        scale: standard deviation of n; None is 1.
    """

    def __init__(
        self,
        *,
        discretization_config: Mapping[str, Any],
        num_idx: Levels,
        flip: bool = True,
        uniform_sampling: bool = False,
        group_num: AtLeast0 = 0,
        distribution: Literal["uniform", "logit_normal"] = "uniform",
        location: float | None = None,
        scale: Positive | None = None,
    ) -> None:
        if distribution not in ("uniform", "logit_normal"):
            raise InputError(f"distribution is {distribution!r}; expected uniform or logit_normal")
        for name, value in {"location": location, "scale": scale}.items():
            if value is not None and distribution == "uniform":
                raise InputError(f"{name} is {value:g}, and timesteps are uniform; set distribution to logit_normal")
        if group_num < 0:
            raise InputError(f"group_num is {group_num}; expected 0 (one group per rank) or a number of groups")
        self.num_idx = num_idx
        self.table = LevelTable.from_config(discretization_config, num_idx, flip=flip)
        self.uniform_sampling = uniform_sampling
        self.group_num = group_num
        self.distribution, self.location, self.scale = distribution, default(location, 0.0), default(scale, 1.0)

    def bounds(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """Return the half-open range [first, end) of shares · num_idx that `rank` of `num_ranks` draws from.

        Raises:
            InputError: the groups do not divide the ranks.
        """
        if not self.uniform_sampling:
            return 0, self.num_idx
        groups = min(self.group_num or num_ranks, num_ranks)
        if num_ranks % groups:
            raise InputError(
                f"uniform_sampling with group_num {self.group_num} on {num_ranks} ranks: the groups must divide the "
                "ranks; set group_num to a divisor, or to 0"
            )
        group = rank // (num_ranks // groups)
        return group * self.num_idx // groups, (group + 1) * self.num_idx // groups

    def draw_idx(
        self, num_samples: int, *, generator: torch.Generator | None = None, rank: int = 0, num_ranks: int = 1
    ) -> torch.Tensor:
        """Return timesteps, int64 (num_samples,), on the generator's device (the CPU without one).

        Args:
            num_samples: number of timesteps.
            generator: source of randomness; torch's global one if None.
            rank: this data-parallel rank.
            num_ranks: data-parallel ranks; both are used by `uniform_sampling` only.
        """
        low, high = self.bounds(rank, num_ranks)
        device = generator.device if generator is not None else "cpu"
        if self.distribution == "uniform":
            return torch.randint(low, high, (num_samples,), generator=generator, device=device)
        uniform = torch.rand(num_samples, generator=generator, device=device, dtype=torch.float64)
        share = (low + (high - low) * uniform) / self.num_idx
        drawn = torch.sigmoid(self.location + self.scale * torch.special.ndtri(share))
        return (drawn * self.num_idx).long().clamp(max=self.num_idx - 1)

    def levels(self, idx: torch.Tensor) -> torch.Tensor:
        """Return the noise levels, float32 (B,), of the timesteps `idx` int64 (B,)."""
        return self.table.at(idx)
