from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgm.modules.diffusionmodules.discretizer import LevelTable, ZeroSNRDDPMDiscretization
from sgm.util import InputError

GOLDEN = load_file(Path(__file__).parents[3] / "data/golden/schedule/io.safetensors")


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("n", [8, 50, 1000])
def test_zero_snr_levels_equal_the_reference(shift: int, n: int) -> None:
    expected = GOLDEN[f"alphas_cumprod_sqrt.shift{shift}.n{n}"]
    levels = ZeroSNRDDPMDiscretization(shift_scale=float(shift))(n, flip=False)
    assert levels.dtype == torch.float32
    assert (levels - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("n", [8, 50])
def test_timesteps_equal_the_reference(n: int) -> None:
    assert torch.equal(ZeroSNRDDPMDiscretization().timesteps(n), GOLDEN[f"timesteps.n{n}"])


def test_all_timesteps_are_visited_when_asked_for() -> None:
    assert ZeroSNRDDPMDiscretization().timesteps(1000).tolist() == list(range(1000))


@pytest.mark.parametrize("n", [0, 1001])
def test_impossible_number_of_steps_names_the_range(n: int) -> None:
    with pytest.raises(InputError, match=rf"num_steps is {n}.*1 to 1000"):
        ZeroSNRDDPMDiscretization()(n)


def test_flip_gives_the_cleanest_level_first() -> None:
    discretization = ZeroSNRDDPMDiscretization()
    assert torch.equal(discretization(20, flip=True), discretization(20).flip(0))
    assert discretization(20, flip=True)[-1] == 0


def test_a_single_step_is_pure_noise() -> None:
    assert ZeroSNRDDPMDiscretization()(1).tolist() == [0.0]


def test_rescaling_keeps_the_cleanest_level_of_the_subset() -> None:
    discretization = ZeroSNRDDPMDiscretization(shift_scale=3.0)
    cleanest = discretization.alphas_cumprod[discretization.timesteps(10)[0]] ** 0.5
    assert discretization(10)[-1].item() == pytest.approx(cleanest, abs=1e-7)


def test_shift_divides_the_signal_to_noise_ratio() -> None:
    plain = ZeroSNRDDPMDiscretization().alphas_cumprod
    shifted = ZeroSNRDDPMDiscretization(shift_scale=3.0).alphas_cumprod
    np.testing.assert_allclose(shifted / (1 - shifted), plain / (1 - plain) / 3, rtol=1e-9)


def test_keep_start_keeps_the_first_beta() -> None:
    kept = ZeroSNRDDPMDiscretization(shift_scale=3.0, keep_start=True)
    assert 1 - kept.alphas_cumprod[0] == pytest.approx(0.00085, rel=1e-9)
    assert 1 - ZeroSNRDDPMDiscretization(shift_scale=3.0).alphas_cumprod[0] == pytest.approx(0.00255, rel=0.01)


def test_post_shift_shifts_the_rescaled_levels() -> None:
    rescaled = ZeroSNRDDPMDiscretization()(50).double() ** 2
    shifted = ZeroSNRDDPMDiscretization(shift_scale=3.0, post_shift=True)(50).double() ** 2
    torch.testing.assert_close(shifted, rescaled / (3 - 2 * rescaled), rtol=1e-5, atol=1e-7)


def test_keep_start_and_post_shift_exclude_each_other() -> None:
    with pytest.raises(InputError, match="keep_start and post_shift"):
        ZeroSNRDDPMDiscretization(shift_scale=3.0, keep_start=True, post_shift=True)


def test_unshifted_levels_follow_the_formula() -> None:
    betas = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    np.testing.assert_allclose(ZeroSNRDDPMDiscretization().alphas_cumprod, np.cumprod(1 - np.array(betas)), rtol=1e-9)


@pytest.mark.parametrize("params", [{"linear_start": 0.0}, {"linear_end": 1.0}, {"linear_start": 0.5}])
def test_impossible_betas_are_refused(params: dict) -> None:
    with pytest.raises(InputError, match="expected 0 < linear_start <= linear_end < 1"):
        ZeroSNRDDPMDiscretization(**params)


def test_table_finds_the_nearest_level() -> None:
    table = LevelTable(torch.tensor([0.9, 0.5, 0.0]))
    assert table.nearest_idx(torch.tensor([0.6, 0.1, 1.0])).tolist() == [1, 2, 0]
    assert table.at(torch.tensor([2, 0])).tolist() == pytest.approx([0.0, 0.9])
