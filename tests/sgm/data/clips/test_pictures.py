"""Training, sampling and precomputing read a picture file alike."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from sgm.data.clips.decode import ClipError, probe, read_frames
from sgm.data.clips.pictures import picture_size, read_picture
from sgm.inference.prompts import Prompt, check_images, load_image
from sgm.util import InputError

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
GREY8 = np.round(RAMP * 255).astype(np.uint8)
HALVES = np.where(np.arange(16) < 8, 0, 255).astype(np.uint8)[None].repeat(16, 0)  # clear, then opaque


def save(path, image, **more):
    image.save(path, **more)
    return path


def png(width: int, height: int) -> bytes:
    """A PNG file that states a size and holds no pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rgb(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def half_red():
    image = Image.new("RGB", (16, 16), (200, 30, 20))
    image.putalpha(Image.fromarray(HALVES))
    return image


RED = np.where(HALVES[..., None] > 0, np.uint8([200, 30, 20]), np.uint8(255))
OVER_WHITE = np.where(HALVES > 0, GREY8, 255)


def with_palette():
    image = half_red().quantize(8)
    assert image.mode == "P" and "transparency" in image.info or image.palette.mode == "RGBA"
    return image


def grey_with_alpha():
    return Image.merge("LA", (Image.fromarray(GREY8), Image.fromarray(HALVES)))


def float_picture(grey):
    return Image.fromarray(grey.astype(np.float32))


CASES = {
    "grey.png": (lambda: Image.fromarray(GREY8), {}, rgb(GREY8)),
    "grey16.png": (lambda: Image.fromarray(np.round(RAMP * 65535).astype(np.uint16)), {}, rgb(GREY8)),
    "grey16.tif": (lambda: Image.fromarray(np.round(RAMP * 65535).astype(np.uint16)), {}, rgb(GREY8)),
    "grey32.tiff": (lambda: Image.fromarray(np.round(RAMP * 65535).astype(np.int32)), {}, rgb(GREY8)),
    "float.tif": (lambda: float_picture(RAMP), {}, rgb(GREY8)),
    "alpha.png": (half_red, {}, RED),
    "alpha.webp": (half_red, {"lossless": True}, RED),
    "grey_alpha.png": (grey_with_alpha, {}, rgb(OVER_WHITE)),
    "clear_colour.png": (lambda: Image.fromarray(rgb(HALVES)), {"transparency": (0, 0, 0)}, rgb(HALVES * 0 + 255)),
    "clear_grey.png": (lambda: Image.fromarray(HALVES), {"transparency": 0}, rgb(HALVES * 0 + 255)),
    "palette.png": (with_palette, {}, RED),
    "bits.bmp": (lambda: Image.fromarray(HALVES).convert("1"), {}, rgb(HALVES)),
    "cmyk.jpg": (
        lambda: Image.new("CMYK", (16, 16), (0, 255, 255, 0)),
        {"quality": 100},
        RED * 0 + np.uint8([255, 0, 0]),
    ),
    "cmyk.tif": (lambda: Image.new("CMYK", (16, 16), (255, 0, 0, 0)), {}, RED * 0 + np.uint8([0, 255, 255])),
}


@pytest.mark.parametrize("name", CASES)
def test_training_and_sampling_read_alike(tmp_path, name):
    make, options, expected = CASES[name]
    path = save(tmp_path / name, make(), **options)
    trained = read_frames(path, [0], probe(path).num_frames)[0].astype(int)
    sampled = ((load_image(path, (16, 16)).permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(int)
    assert np.array_equal(trained, sampled)
    assert np.abs(trained - expected.astype(int)).max() <= 2
    assert np.array_equal(read_picture(io.BytesIO(path.read_bytes())), trained), "as in an archive"


@pytest.mark.parametrize("name", ["a.jpg", "a.jpe", "a.jfif", "a.png", "a.tif", "a.webp"])
def test_orientation_is_applied_alike(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    path = save(tmp_path / name, Image.fromarray(pixels), exif=exif)
    info, frame = probe(path), read_frames(path, [0], 1)[0]
    assert (info.height, info.width) == picture_size(str(path)) == frame.shape[:2] == (16, 8)
    assert frame[:7].min() > 200 and frame[9:].max() < 50
    assert np.abs((load_image(path, (16, 8)).permute(1, 2, 0).numpy() + 1) * 127.5 - frame).max() <= 1


def refusals(path) -> tuple[str, str]:
    """Return why training and sampling refuse a picture."""
    with pytest.raises(ClipError) as trained:
        probe(path)
    with pytest.raises(InputError) as sampled:
        check_images([Prompt(0, "a", path)])
    return trained.value.reason, str(sampled.value)


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_an_animation_is_no_picture_for_training_and_sampling(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    for said in refusals(tmp_path / name):
        assert "it is an animation of 3 pictures; save it as a video, or one of them as a picture" in said


def test_what_is_not_a_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name in ("a.png", "b.png"):
        reason, message = refusals(tmp_path / name)
        assert "not a file" in reason and "not a file" in message


@pytest.mark.parametrize(
    ("content", "trained", "said"),
    [
        (png(20_000, 5_000), "cannot be used", "it is too large: 5000x20000 pixels, of at most 89,478,485"),
        (png(20_000, 20_000), "cannot be used", "it is too large"),
        (png(16, 16), "is not a picture, or a damaged one", "image file is truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture", "no known image format"),
        (float_picture(RAMP * 255), "cannot be used", "mode F) from 0 to 255; save it with 8 or 16 bits, or as floats"),
        (float_picture(RAMP + np.nan), "cannot be used", "from nan to nan"),
        (float_picture(RAMP - 0.1), "cannot be used", "from -0.1 to 0.9"),
    ],
)
def test_what_cannot_be_used_is_refused_alike(tmp_path, content, trained, said):
    path = tmp_path / "a.tif"
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        reason, message = refusals(path)
    assert reason.startswith(trained) and said in reason and said in message and "a.tif' cannot be decoded" in message
