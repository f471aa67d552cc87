import pytest
import torch

from sgm.modules.diffusionmodules.sigma_sampling import DiscreteSampling
from sgm.util import InputError

DISCRETIZATION = {"target": "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization"}


def discrete(**params: int) -> DiscreteSampling:
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
