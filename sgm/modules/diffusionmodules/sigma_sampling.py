"""Sigma sampling: draw the noise levels of a training step."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from sgm.config.values import NotNegative, Positive
from sgm.modules.diffusionmodules.discretizer import Levels, LevelTable
from sgm.util import InputError, default, to_device

# Distribution → parameters that no other one has.
_PARAMETERS = {"uniform": (), "logit_normal": ("location", "scale"), "importance": ("importance",), "loss": ()}


class LossMoments:
    """Mean square of the loss in equal ranges of the timesteps, and how often to draw from each for the least variance.

    After Nichol & Dhariwal 2021, section 3.3: timesteps are drawn in proportion to √E[L²], where E is a mean of the
    last losses. Until every range has had `ENOUGH` samples, all are drawn alike. A mean is that of all samples of its
    range up to `HORIZON`, and decays by 1/`HORIZON` with each one from then on. Ranges, of which the paper has one for
    each timestep, since a LoRA sees few samples of each.
    """

    NUM_RANGES, ENOUGH, HORIZON = 10, 10, 100
    EVEN = 0.1  # share that is drawn evenly, which bounds the weight of a sample by its inverse

    def __init__(self, num_idx: int) -> None:
        self.num_idx = num_idx
        self.means = [0.0] * self.NUM_RANGES
        self.counts = [0.0] * self.NUM_RANGES

    def sums(self, idx: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) and losses (B,) → float32 (2, `NUM_RANGES`): sums of squares, and numbers of samples."""
        ranges = torch.arange(self.NUM_RANGES, device=idx.device)
        hits = idx[:, None] * self.NUM_RANGES // self.num_idx == ranges
        squares = losses.detach().float().square()
        return torch.stack(((hits * squares[:, None]).sum(0), hits.sum(0)))

    def update(self, sums: torch.Tensor) -> None:
        """Take the losses of a step, as `sums` of all its samples, into the means."""
        for index, (total, number) in enumerate(zip(*sums.tolist(), strict=True)):
            if number:
                self.counts[index] += number
                share = min(1.0, number / min(self.counts[index], self.HORIZON))
                self.means[index] += share * (total / number - self.means[index])

    def shares(self) -> list[float]:
        """Return how often each range is drawn; the sum is 1."""
        roots = [math.sqrt(mean) for mean in self.means]
        if min(self.counts) < self.ENOUGH or sum(roots) == 0:
            return [1 / self.NUM_RANGES] * self.NUM_RANGES
        return [(1 - self.EVEN) * root / sum(roots) + self.EVEN / self.NUM_RANGES for root in roots]

    def state(self) -> dict[str, list[float]]:
        """Return what a resumed run needs, for JSON, which keeps every bit of it."""
        return {"means": list(self.means), "counts": list(self.counts)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take a `state`.

        Raises:
            InputError: it is none.
        """
        found = [state.get(name) for name in ("means", "counts")]
        for values in found:
            numbers = values if isinstance(values, list) else []
            if len(numbers) != self.NUM_RANGES or not all(isinstance(n, float | int) and n >= 0 for n in numbers):
                raise InputError(
                    f"losses by timestep are {values}; expected {self.NUM_RANGES} numbers of 0 or more; restore "
                    "resume.json, or start a new run with args.resume=none"
                )
        self.means, self.counts = ([float(n) for n in values] for values in found)  # pyright: ignore[reportOptionalIterable]


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
            normal number n, so that middle timesteps are drawn more often than the ends; ``importance``; or ``loss``:
            where the loss of this run is large, see `LossMoments`, with the inverse weight in the loss of training, so
            that its mean is that of uniform timesteps and varies less.
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
        group_num: Annotated[int, Field(ge=0, le=1_000_000)] = 0,
        strata: Levels = 1,
        distribution: Literal["uniform", "logit_normal", "importance", "loss"] = "uniform",
        location: Annotated[float, Field(ge=-100, le=100)] | None = None,
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
        if distribution == "loss" and num_idx < LossMoments.NUM_RANGES:
            raise InputError(f"distribution is loss, and num_idx {num_idx}; give {LossMoments.NUM_RANGES} or more")
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
        self.moments = LossMoments(num_idx) if distribution == "loss" else None

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
        ends = self._ends_of_ranges().to(share.device)
        num_ranges = len(ends) - 1
        index = torch.searchsorted(ends, share, right=True).clamp(max=num_ranges) - 1
        return (index + (share - ends[index]) / (ends[index + 1] - ends[index])) / num_ranges

    def _ends_of_ranges(self) -> torch.Tensor:
        """Return the share of timesteps drawn below each end of the ranges, from 0 to 1: float64 (ranges + 1,)."""
        often = self.importance if self.moments is None else self.moments.shares()
        assert often is not None
        ends = torch.tensor([0.0, *often], dtype=torch.float64).cumsum(0)
        return ends / ends[-1].clone()

    def weights(self, idx: torch.Tensor) -> torch.Tensor | None:
        """Return the factors float32 (B,) for which the mean loss is that of uniform timesteps; None for 1.

        1 / (`num_idx` · P(t)) of the timesteps `idx` (B,) with ``loss``, whose choice is one of variance alone; others
        are to change what is learned.
        """
        if self.moments is None:
            return None
        ends = self._ends_of_ranges()
        place = torch.arange(self.num_idx + 1, dtype=torch.float64) / self.num_idx * (len(ends) - 1)
        index = place.long().clamp(max=len(ends) - 2)
        drawn = ends[index] + (place - index) * (ends[index + 1] - ends[index])  # below each timestep
        return to_device((1 / (self.num_idx * drawn.diff())).float(), idx.device)[idx]

    def levels(self, idx: torch.Tensor) -> torch.Tensor:
        """Return the noise levels, float32 (B,), of the timesteps `idx` int64 (B,)."""
        return self.table.at(idx)
