"""Sigma sampling: draw the noise levels of a training step."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from sgm.config.values import AtLeast0, AtLeast1, NotNegative, Positive
from sgm.modules.diffusionmodules.discretizer import Levels, LevelTable
from sgm.util import InputError, default

# Distribution → parameters that no other one has.
_PARAMETERS = {"uniform": (), "logit_normal": ("location", "scale"), "importance": ("importance",)}


class DiscreteSampling:
    """Timesteps drawn uniformly or from another distribution, mapped to noise levels by a table.

    With `uniform_sampling`, data-parallel ranks draw from different parts of the schedule, so that each optimizer
    step sees all of it: the ranks form groups, and group g of G draws from the shares [g, g + 1) / G of the
    distribution: uniformly, from the timesteps [g, g + 1) · num_idx / G. With `strata`, sample number n draws from the
    share n modulo `strata` instead, on any rank, so that every `strata` samples in a row see all of the schedule and
    the mean loss of a step varies less (stratified sampling).

    Args:
        discretization_config: how the table is computed, see `discretizer`.
        num_idx: timesteps.
        flip: timestep 0 is the cleanest level.
        uniform_sampling: spread the ranks over the schedule.
        group_num: groups with `uniform_sampling`; 0 for one per rank. Never more than ranks.
        strata: parts of the distribution that samples draw from in turn; 1 draws each from all of it.
        distribution: ``uniform``; ``logit_normal`` (Esser et al. 2024, section 3.1): t = num_idx · sigmoid(n) for a
            normal number n, so that middle timesteps are drawn more often than the ends; or ``importance``.
        location: of ``logit_normal``: mean of n; above 0 favours noisy timesteps. None is 0.
        scale: of ``logit_normal``: standard deviation of n; None is 1.
        importance: of ``importance``: how often timesteps are drawn, relative to each other, of as many equal ranges as
            there are numbers, the cleanest first; such as the losses of a run by timestep.
    """

    def __init__(
        self,
        *,
        discretization_config: Mapping[str, Any],
        num_idx: Levels,
        flip: bool = True,
        uniform_sampling: bool = False,
        group_num: AtLeast0 = 0,
        strata: AtLeast1 = 1,
        distribution: Literal["uniform", "logit_normal", "importance"] = "uniform",
        location: float | None = None,
        scale: Positive | None = None,
        importance: Sequence[NotNegative] | None = None,
    ) -> None:
        if distribution not in _PARAMETERS:
            raise InputError(f"distribution is {distribution!r}; expected one of {', '.join(_PARAMETERS)}")
        given = {"location": location, "scale": scale, "importance": importance}
        for owner, names in _PARAMETERS.items():
            for name in names:
                if given[name] is not None and owner != distribution:
                    raise InputError(
                        f"{name} is {given[name]}, and timesteps are {distribution}; set distribution to {owner}"
                    )
        if distribution == "importance" and not (importance and sum(importance) > 0 and len(importance) <= num_idx):
            raise InputError(
                f"importance is {importance}; expected how often timesteps are drawn, as up to {num_idx} numbers of 0 "
                "or more, not all 0, such as [1, 2, 2, 1]"
            )
        if group_num < 0:
            raise InputError(f"group_num is {group_num}; expected 0 (one group per rank) or a number of groups")
        if strata > 1 and uniform_sampling:
            raise InputError(f"strata is {strata}, beside uniform_sampling, which spreads ranks instead; remove one")
        self.num_idx = num_idx
        self.table = LevelTable.from_config(discretization_config, num_idx, flip=flip)
        self.uniform_sampling = uniform_sampling
        self.group_num = group_num
        self.strata = strata
        self.distribution, self.location, self.scale = distribution, default(location, 0.0), default(scale, 1.0)
        self.importance = importance

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
        self,
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        number: int = 0,
    ) -> torch.Tensor:
        """Return timesteps, int64 (num_samples,), on the generator's device (the CPU without one).

        Args:
            num_samples: number of timesteps.
            generator: source of randomness; torch's global one if None.
            rank: this data-parallel rank.
            num_ranks: data-parallel ranks; both are used by `uniform_sampling` only.
            number: of the sample in the run, for `strata`.
        """
        low, high = self.bounds(rank, num_ranks)
        if self.strata > 1:
            low, high = (self.num_idx * (number % self.strata + end) / self.strata for end in (0, 1))
        device = generator.device if generator is not None else "cpu"
        if self.distribution == "uniform" and self.strata == 1:
            return torch.randint(int(low), int(high), (num_samples,), generator=generator, device=device)
        uniform = torch.rand(num_samples, generator=generator, device=device, dtype=torch.float64)
        share = (low + (high - low) * uniform) / self.num_idx
        return (self._quantile(share) * self.num_idx).long().clamp(max=self.num_idx - 1)

    def _quantile(self, share: torch.Tensor) -> torch.Tensor:
        """Return the t / num_idx below which a share of all timesteps is drawn; float64 of any shape, in [0, 1]."""
        if self.distribution == "uniform":
            return share
        if self.distribution == "logit_normal":
            return torch.sigmoid(self.location + self.scale * torch.special.ndtri(share))
        assert self.importance is not None
        ends = torch.tensor([0.0, *self.importance], dtype=share.dtype, device=share.device).cumsum(0)
        ends = ends / ends[-1].clone()
        index = torch.searchsorted(ends, share, right=True).clamp(max=len(self.importance)) - 1
        return (index + (share - ends[index]) / (ends[index + 1] - ends[index])) / len(self.importance)

    def levels(self, idx: torch.Tensor) -> torch.Tensor:
        """Return the noise levels, float32 (B,), of the timesteps `idx` int64 (B,)."""
        return self.table.at(idx)
