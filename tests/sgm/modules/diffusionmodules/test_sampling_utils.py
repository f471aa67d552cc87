import math

import pytest
import torch

from sgm.modules.diffusionmodules.sampling_utils import (
    StepWeights,
    apply_step,
    ddim_weights,
    dpmpp_2m_sde_weights,
    draw_noise,
)


def lam(a: float) -> float:
    return math.log(a / math.sqrt(1 - a**2))


def test_dpmpp_weights_follow_the_solver() -> None:
    previous, a, following = 0.2, 0.4, 0.7
    h, h_last = lam(following) - lam(a), lam(a) - lam(previous)
    s, s_next = math.sqrt(1 - a**2), math.sqrt(1 - following**2)
    weights = dpmpp_2m_sde_weights(previous, a, following)
    assert weights.sample == pytest.approx(s_next / s * math.exp(-h))
    assert weights.denoised == pytest.approx(following * (1 - math.exp(-2 * h)))
    assert weights.noise == pytest.approx(s_next * math.sqrt(1 - math.exp(-2 * h)))
    assert weights.extrapolation == pytest.approx(1 / (2 * (h_last / h)))


def test_dpmpp_keeps_the_variance() -> None:
    # Unit-variance data with posterior mean a·x must keep unit variance.
    a, following = 0.4, 0.7
    weights = dpmpp_2m_sde_weights(None, a, following)
    signal = weights.sample * a + weights.denoised
    noise = (weights.sample**2) * (1 - a**2) + weights.noise**2
    assert signal == pytest.approx(following)
    assert noise == pytest.approx(1 - following**2)


def test_dpmpp_limits_at_both_ends_are_finite() -> None:
    assert dpmpp_2m_sde_weights(None, 0.0, 0.3) == StepWeights(0.0, 0.3, pytest.approx(math.sqrt(0.91)), 0.0)
    assert dpmpp_2m_sde_weights(0.0, 0.3, 0.6).extrapolation == 0.0
    assert dpmpp_2m_sde_weights(0.6, 0.9, 1.0) == StepWeights(0.0, 1.0, 0.0, 0.0)
    near = dpmpp_2m_sde_weights(1e-9, 0.3, 0.6)
    assert near.extrapolation < 0.05


def test_ddim_keeps_the_noise_it_finds() -> None:
    a, following = 0.4, 0.7
    clean, noise = torch.randn(1, 8), torch.randn(1, 8)
    x = a * clean + math.sqrt(1 - a**2) * noise
    stepped = apply_step(ddim_weights(a, following), x, clean)
    torch.testing.assert_close(stepped, following * clean + math.sqrt(1 - following**2) * noise)
    assert ddim_weights(0.9, 1.0) == StepWeights(0.0, 1.0)


def test_step_extrapolates_away_from_the_previous_result() -> None:
    weights = StepWeights(sample=2.0, denoised=3.0, noise=0.5, extrapolation=0.25)
    one = torch.ones(1)
    stepped = apply_step(weights, one, 10 * one, previous_denoised=6 * one, noise=4 * one)
    assert stepped.item() == 2 * 1 + 3 * (1.25 * 10 - 0.25 * 6) + 0.5 * 4


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    alone = draw_noise(torch.empty(1, 3, 5), [torch.Generator().manual_seed(7)])
    batch = draw_noise(torch.empty(2, 3, 5), [torch.Generator().manual_seed(seed) for seed in (1, 7)])
    assert torch.equal(alone[0], batch[1])
    assert not torch.equal(batch[0], batch[1])


def test_noise_of_one_generator_is_that_of_the_global_one() -> None:
    torch.manual_seed(7)
    expected = draw_noise(torch.empty(1, 3, 50))
    assert torch.equal(draw_noise(torch.empty(1, 3, 50), [torch.Generator().manual_seed(7)]), expected)


def test_wrong_number_of_generators_is_refused() -> None:
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        draw_noise(torch.empty(2, 3), [torch.Generator()])
