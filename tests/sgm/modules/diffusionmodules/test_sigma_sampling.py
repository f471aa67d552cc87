from typing import Any

import pytest
import torch

from sgm.modules.diffusionmodules.sigma_sampling import DiscreteSampling
from sgm.util import InputError

DISCRETIZATION = {"target": "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization"}


def discrete(**params: Any) -> DiscreteSampling:
    return DiscreteSampling(discretization_config=DISCRETIZATION, num_idx=1000, **params)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_timesteps_cover_the_schedule_and_follow_the_generator() -> None:
    sampler = discrete()
    idx = sampler.draw_idx(20000, generator=generator(0))
    assert (idx.min(), idx.max()) == (0, 999)
    assert torch.equal(idx, sampler.draw_idx(20000, generator=generator(0)))
    assert not torch.equal(idx, sampler.draw_idx(20000, generator=generator(1)))


def test_levels_fall_with_the_timestep() -> None:
    sampler = discrete()
    levels = sampler.levels(torch.tensor([0, 500, 999]))
    assert levels[0] > levels[1] > levels[2] == 0


def test_uniform_sampling_spreads_the_ranks_over_the_schedule() -> None:
    sampler = discrete(uniform_sampling=True, group_num=4)
    assert [sampler.bounds(rank, 8) for rank in (0, 1, 2, 7)] == [(0, 250), (0, 250), (250, 500), (750, 1000)]
    idx = sampler.draw_idx(1000, generator=generator(0), rank=3, num_ranks=8)
    assert 250 <= idx.min() and idx.max() < 500


def test_uniform_sampling_on_fewer_ranks_than_groups_still_covers_the_schedule() -> None:
    sampler = discrete(uniform_sampling=True, group_num=40)
    assert sampler.bounds(0, 1) == (0, 1000)
    assert [sampler.bounds(rank, 3) for rank in range(3)] == [(0, 333), (333, 666), (666, 1000)]


def test_groups_without_uniform_sampling_leave_every_rank_the_whole_schedule() -> None:
    assert discrete(group_num=40).bounds(5, 80) == (0, 1000)


def test_groups_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(InputError, match="group_num 3 on 8 ranks"):
        discrete(uniform_sampling=True, group_num=3).bounds(0, 8)


def test_logit_normal_timesteps_have_that_distribution_also_over_ranks() -> None:
    sampler = discrete(distribution="logit_normal", location=0.5, scale=0.8)
    idx = sampler.draw_idx(20000, generator=generator(0)).double()
    logits = torch.logit((idx + 0.5) / 1000)
    assert logits.mean() == pytest.approx(0.5, abs=0.02) and logits.std() == pytest.approx(0.8, abs=0.02)
    spread = discrete(distribution="logit_normal", uniform_sampling=True)
    parts = [spread.draw_idx(1000, generator=generator(1), rank=rank, num_ranks=4) for rank in range(4)]
    assert [int(part.max()) for part in parts[:-1]] <= [int(part.min()) for part in parts[1:]]
    assert torch.cat(parts).double().mean() == pytest.approx(500, abs=5), "strata of the distribution, not of time"
    half = torch.cat(parts[1:3])
    assert 330 < half.min() and half.max() < 670, "half of a normal distribution is within 0.674 of its mean"


@pytest.mark.parametrize("name", ["location", "scale"])
def test_parameters_of_a_distribution_need_it(name) -> None:
    with pytest.raises(InputError, match=f"{name} is 0.5, and timesteps are uniform; set distribution to logit_normal"):
        discrete(**{name: 0.5})


def test_importance_is_how_often_ranges_of_timesteps_are_drawn() -> None:
    idx = discrete(distribution="importance", importance=[1, 0, 2, 1]).draw_idx(20000, generator=generator(0))
    counts = torch.histc(idx.double(), bins=4, min=0, max=1000) / 20000
    assert counts.tolist() == pytest.approx([0.25, 0, 0.5, 0.25], abs=0.01)
    half = idx[(idx >= 500) & (idx < 750)].double()
    assert half.mean() == pytest.approx(624.5, abs=3), "uniform within a range"


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"distribution": "logit_normal", "location": 1.0},
        {"distribution": "importance", "importance": [3, 1, 0, 0, 2]},
    ],
)
def test_samples_in_a_row_draw_from_all_strata_of_the_distribution(params) -> None:
    plain, spread = discrete(**params), discrete(**params, strata=4)
    parts = [spread.draw_idx(5000, generator=generator(n), number=n, rank=n % 3, num_ranks=3) for n in range(8, 12)]
    assert [int(part.max()) for part in parts[:-1]] <= [int(part.min()) for part in parts[1:]]
    drawn, expected = torch.cat(parts).double(), plain.draw_idx(20000, generator=generator(0)).double()
    quantiles = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    assert (drawn.quantile(quantiles) - expected.quantile(quantiles)).abs().median() < 8


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"importance": [1, 2]}, "importance is \\[1, 2\\], and timesteps are uniform; set distribution to importance"),
        ({"distribution": "importance"}, "importance is None; expected how often timesteps are drawn"),
        ({"distribution": "importance", "importance": [0, 0]}, "not all 0"),
        ({"strata": 4, "uniform_sampling": True}, "strata is 4, beside uniform_sampling"),
        ({"distribution": "normal"}, "expected one of uniform, logit_normal, importance"),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused(params, message) -> None:
    with pytest.raises(InputError, match=message):
        discrete(**params)
