import pytest
import torch

from sgm.data.clips.transform import cover_crop


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (32, 32), (33, 31), (8, 200)])
def test_frames_cover_the_size_and_are_cropped_to_the_centre(shape):
    h, w = shape
    ramp_h = torch.linspace(-1, 1, h)[:, None].expand(h, w)
    ramp_w = torch.linspace(-1, 1, w)[None].expand(h, w)
    out = cover_crop(torch.stack([ramp_h, ramp_w, ramp_h])[None], (32, 32))
    assert out.shape == (1, 3, 32, 32)
    assert out.abs().max() <= 1
    # Symmetric pictures stay so, but for the odd pixel that cannot be halved.
    assert out[0, 0].mean().abs() < 0.06
    assert out[0, 1].mean().abs() < 0.06
    scale = max(32 / h, 32 / w)
    assert out[0, 1, 16, -1] - out[0, 1, 16, 0] == pytest.approx(2 * 31 / (w * scale), abs=0.12)


def test_a_fitting_picture_is_left_alone():
    pictures = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(cover_crop(pictures, (16, 24)), pictures)


def test_overshoot_is_clamped():
    edge = torch.full((1, 3, 8, 8), -1.0)
    edge[..., 4:] = 1
    out = cover_crop(edge, (32, 32))
    assert (out.min(), out.max()) == (-1, 1)


def test_each_picture_by_itself():
    pictures = torch.rand(5, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = cover_crop(pictures, (16, 16))
    assert torch.equal(together, torch.cat([cover_crop(one, (16, 16)) for one in pictures.split(2)]))
