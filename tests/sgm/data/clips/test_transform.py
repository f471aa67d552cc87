import pytest
import torch
from kornia.geometry.transform import resize

from sgm.data.clips.transform import cover_crop, covering_size, stretch


def by_kornia(pictures, size):
    return resize(pictures, size, interpolation="bicubic", align_corners=False, antialias=True).clamp(-1, 1)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((90, 160), (60, 90)),  # of 720p to 480x720
        ((97, 61), (41, 33)),  # odd sides
        ((40, 7), (9, 3)),
        ((130, 1), (20, 3)),  # enlarged along one axis, whole along the other
        ((1, 70), (1, 33)),
        ((2, 3), (1, 1)),
        ((1, 1), (4, 5)),
        ((13, 17), (40, 64)),
        ((200, 9), (3, 70)),  # one axis is enlarged
        ((64, 50), (64, 20)),  # one axis stays
    ],
)
def test_pixels_are_those_of_kornia(shape, size):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8, generator=generator)
    floats, covering = pictures.float() / 127.5 - 1, covering_size(shape, size)
    place = 0.7, 0.4
    top, left = (int(share * (side - kept + 1)) for share, side, kept in zip(place, covering, size, strict=True))
    cropped = by_kornia(floats, covering)[..., top : top + size[0], left : left + size[1]]
    for source in (pictures, floats, pictures.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        torch.testing.assert_close(stretch(source, size), by_kornia(floats, size), rtol=0, atol=2e-6)
        torch.testing.assert_close(cover_crop(source, size, place), cropped, rtol=0, atol=2e-6)
    wider = stretch(floats.double(), size)
    assert wider.dtype == torch.float64
    torch.testing.assert_close(wider, by_kornia(floats, size).double(), rtol=0, atol=2e-6)


def test_bytes_that_fit_are_scaled():
    pictures = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 6)
    out = cover_crop(pictures, (4, 5))
    assert out.shape == (1, 3, 4, 5) and out.dtype == torch.float32
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))


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
