import pytest
import torch

from sgm.modules.diffusionmodules.denoiser_scaling import VideoScaling

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
