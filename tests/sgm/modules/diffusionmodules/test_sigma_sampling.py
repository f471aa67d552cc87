import json
from typing import Any

import pytest
import torch

from sgm.modules.diffusionmodules.sigma_sampling import DiscreteSampling, LossMoments
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


def with_losses(**params: Any) -> DiscreteSampling:
    """Return a sampler that knows a loss of 2 at clean timesteps, 1 at noisy ones and 5 in between, of one range."""
    sampler = discrete(distribution="loss", **params)
    idx = torch.arange(1000).repeat(2)
    sampler.moments.update(sampler.moments.sums(idx, loss_of(idx)))
    return sampler


def loss_of(idx: torch.Tensor) -> torch.Tensor:
    return torch.where(idx < 400, 2.0, torch.where(idx < 500, 5.0, 1.0))


def test_timesteps_are_drawn_by_their_loss_and_its_mean_stays_that_of_uniform_ones() -> None:
    sampler = with_losses()
    idx = sampler.draw_idx(40000, generator=generator(0))
    counts = torch.histc(idx.double(), bins=10, min=0, max=1000) / 40000
    # In proportion to the losses, which sum up to 18 over the ranges, but for the tenth that is drawn evenly.
    expected = [0.9 * loss / 18 + 0.01 for loss in [2.0] * 4 + [5.0] + [1.0] * 5]
    assert counts.tolist() == pytest.approx(expected, abs=0.005)
    weights, losses = sampler.weights(idx), loss_of(idx)
    assert weights is not None and (losses * weights).mean() == pytest.approx(1.8, abs=0.01)
    uniform = loss_of(discrete().draw_idx(40000, generator=generator(0)))
    assert (losses * weights).std() < 0.3 * uniform.std(), "what it is for"
    assert discrete().weights(idx) is discrete(distribution="logit_normal").weights(idx) is None


def test_weights_are_exact_where_ranges_end_within_a_timestep() -> None:
    sampler = DiscreteSampling(discretization_config=DISCRETIZATION, num_idx=25, distribution="loss")
    everywhere = torch.arange(25).repeat(100)
    sampler.moments.update(sampler.moments.sums(everywhere, everywhere.float()))
    idx = sampler.draw_idx(100000, generator=generator(0))
    weights = sampler.weights(torch.arange(25))
    drawn = torch.bincount(idx, minlength=25) / 100000
    assert (drawn * weights).tolist() == pytest.approx([1 / 25] * 25, rel=0.1)


def test_timesteps_are_uniform_until_every_range_has_enough_samples() -> None:
    sampler = discrete(distribution="loss")
    moments = sampler.moments
    assert moments is not None
    known = torch.arange(0, 900).repeat(5)
    moments.update(moments.sums(known, loss_of(known)))
    last = torch.full((moments.ENOUGH - 1,), 950)
    moments.update(moments.sums(last, loss_of(last)))
    assert moments.shares() == [0.1] * 10
    assert sampler.weights(torch.tensor([0, 999])).tolist() == pytest.approx([1, 1])
    moments.update(moments.sums(last[:1], loss_of(last[:1])))
    assert moments.shares()[4] > 0.2


def test_means_are_of_all_samples_at_first_then_of_the_last_ones() -> None:
    moments = LossMoments(1000)
    for loss in (1.0, 2.0, 3.0):
        moments.update(moments.sums(torch.tensor([0, 999]), torch.tensor([loss, 1.0])))
    assert (moments.means[0], moments.means[9]) == (pytest.approx(14 / 3), 1)
    assert moments.counts == [3] + [0] * 8 + [3]
    moments.update(moments.sums(torch.zeros(1000, dtype=torch.int64), torch.full((1000,), 4.0)))
    assert moments.means[0] == 16, "as many as the horizon: the former ones are forgotten"
    together, apart = LossMoments(1000), LossMoments(1000)
    idx, losses = torch.arange(0, 1000, 9), torch.rand(112, generator=generator(0))
    together.update(together.sums(idx, losses))
    apart.update(apart.sums(idx[:50], losses[:50]) + apart.sums(idx[50:], losses[50:]))
    assert apart.means == pytest.approx(together.means) and apart.counts == together.counts, "of ranks, in any division"


def test_the_state_of_a_sampler_is_kept_to_the_last_bit_and_checked() -> None:
    sampler, other = with_losses(), discrete(distribution="loss")
    other.moments.load_state(json.loads(json.dumps(sampler.moments.state())))
    assert other.moments.state() == sampler.moments.state()
    drawn = [each.draw_idx(100, generator=generator(3)) for each in (sampler, other)]
    assert torch.equal(*drawn)
    for wrong in ({"means": [1.0], "counts": [0.0] * 10}, {"means": [1.0] * 10}, {"means": [-1.0] * 10, "counts": 3}):
        with pytest.raises(InputError, match="losses by timestep are .* expected 10 numbers"):
            other.moments.load_state(wrong)


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
