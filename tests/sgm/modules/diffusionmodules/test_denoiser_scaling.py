import pytest
import torch

from sgm.modules.diffusionmodules.denoiser_scaling import EDMScaling, EpsScaling, VideoScaling, VScaling

SIGMAS = torch.tensor([0.02, 0.7, 30.0])
ALPHAS = torch.tensor([0.0, 0.6, 0.999])


def test_video_scaling() -> None:
    scale = VideoScaling()(ALPHAS, idx=torch.tensor([999, 500, 0]))
    assert scale.c_skip.tolist() == pytest.approx([0.0, 0.6, 0.999])
    assert scale.c_out.tolist() == pytest.approx([-1.0, -0.8, -((1 - 0.999**2) ** 0.5)], abs=1e-5)
    assert scale.c_in.tolist() == [1, 1, 1]
    assert scale.c_noise.tolist() == [999, 500, 0]


def test_video_scaling_recovers_the_data_from_v() -> None:
    clean, noise, a = torch.randn(3, 5), torch.randn(3, 5), ALPHAS[:, None]
    s = (1 - a**2) ** 0.5
    scale = VideoScaling()(ALPHAS, idx=torch.zeros(3, dtype=torch.long))
    denoised = scale.c_skip[:, None] * (a * clean + s * noise) + scale.c_out[:, None] * (a * noise - s * clean)
    torch.testing.assert_close(denoised, clean)


def test_video_scaling_without_timesteps_is_refused() -> None:
    with pytest.raises(ValueError, match="idx"):
        VideoScaling()(ALPHAS)


def test_edm_scaling() -> None:
    scale = EDMScaling(sigma_data=0.3)(SIGMAS)
    total = SIGMAS**2 + 0.09
    torch.testing.assert_close(scale.c_skip, 0.09 / total)
    torch.testing.assert_close(scale.c_out, SIGMAS * 0.3 / total.sqrt())
    torch.testing.assert_close(scale.c_in, total.rsqrt())
    torch.testing.assert_close(scale.c_noise, SIGMAS.log() / 4)


def test_eps_scaling_recovers_the_data_from_the_noise() -> None:
    clean, noise = torch.randn(3, 5), torch.randn(3, 5)
    scale = EpsScaling()(SIGMAS)
    noised = clean + SIGMAS[:, None] * noise
    torch.testing.assert_close(
        scale.c_skip[:, None] * noised + scale.c_out[:, None] * noise, clean, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(scale.c_in, (SIGMAS**2 + 1) ** -0.5)
    torch.testing.assert_close(scale.c_noise, SIGMAS)


def test_v_scaling_recovers_the_data_from_v() -> None:
    clean, noise = torch.randn(3, 5), torch.randn(3, 5)
    scale = VScaling()(SIGMAS)
    a = ((SIGMAS**2 + 1) ** -0.5)[:, None]
    v = a * noise - SIGMAS[:, None] * a * clean
    noised = clean + SIGMAS[:, None] * noise
    torch.testing.assert_close(scale.c_skip[:, None] * noised + scale.c_out[:, None] * v, clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scale.c_in, a[:, 0])
    torch.testing.assert_close(scale.c_noise, SIGMAS)
