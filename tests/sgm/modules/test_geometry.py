import dataclasses
from pathlib import Path

import pytest
import yaml

from sgm.modules.geometry import Geometry, normalize_patch_size
from sgm.util import InputError

CONFIGS = Path(__file__).parents[3] / "configs"


def shipped(name: str) -> Geometry:
    model = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    return Geometry.from_network(model["network_config"]["params"])


@pytest.mark.parametrize(
    ("name", "latents", "frames", "max_size", "positions", "image"),
    [
        ("cogvideox_2b", 13, 49, (480, 720), "sincos", False),
        ("cogvideox_5b", 13, 49, (480, 720), "rotary", False),
        ("cogvideox_5b_i2v", 13, 49, (480, 720), "learned", True),
        ("cogvideox1.5_5b", 21, 81, (2400, 2400), "rotary", False),
        ("cogvideox1.5_5b_i2v", 21, 81, (2400, 2400), "rotary", True),
        ("toy", 5, 17, (64, 64), "rotary", False),
    ],
)
def test_released_models(name, latents, frames, max_size, positions, image):
    geometry = shipped(name)
    assert geometry.max_latents == latents
    assert geometry.legal_frames()[-1] == frames
    assert geometry.max_size == max_size
    assert geometry.positions == positions
    assert geometry.image_conditioned is image


def test_frames_of_the_2b():
    geometry = shipped("cogvideox_2b")
    assert geometry.legal_latents() == list(range(1, 14))
    assert geometry.legal_frames()[:3] == [1, 5, 9]
    assert [geometry.kept_latents(n) for n in (1, 12, 13)] == [1, 12, 13]
    assert geometry.padded_latents(13) == 13


def test_temporal_patch_two_pads_odd_counts_only():
    geometry = shipped("cogvideox1.5_5b")
    assert [geometry.kept_latents(n) for n in (1, 2, 19, 20, 21)] == [1, 2, 19, 20, 21]
    assert [geometry.padded_latents(n) for n in (19, 20, 21)] == [20, 20, 22]
    assert [geometry.video_frames(n) for n in (20, 21)] == [77, 81]
    assert geometry.legal_latents() == list(range(1, 22))
    assert geometry.legal_frames() == list(range(1, 82, 4))
    assert geometry.num_patches(20, (768, 1360)) == geometry.num_patches(19, (768, 1360)) == 10 * 48 * 85


def test_the_longest_video_may_be_counted_with_its_padding():
    geometry = shipped("cogvideox1.5_5b")
    assert geometry.kept_latents(22) == 21 and geometry.kept_latents(23) == 23
    even = dataclasses.replace(geometry, max_latents=22)
    assert even.kept_latents(22) == 22 and even.padded_latents(22) == 22


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox_5b_i2v"])
def test_position_tables_fit_one_size(name):
    geometry = shipped(name)
    assert geometry.size_is_legal(480, 720)
    assert not geometry.size_is_legal(464, 720)
    assert geometry.nearest_size(256, 256) == (480, 720)


def test_rotary_positions_take_smaller_sizes():
    geometry = shipped("cogvideox_5b")
    assert geometry.size_is_legal(256, 384)
    assert not geometry.size_is_legal(256, 390)  # not a multiple of 16
    assert not geometry.size_is_legal(496, 720)  # too high
    assert geometry.nearest_size(250, 5000) == (256, 720)
    assert geometry.nearest_size(1, 1) == (16, 16)


def test_default_sizes():
    assert shipped("cogvideox_5b").default_size() == (480, 720)
    assert shipped("cogvideox1.5_5b").default_size() == (768, 1360)


@pytest.mark.parametrize(
    ("image", "size"),
    [((768, 1360), (768, 1360)), ((1080, 1920), (768, 1360)), ((500, 500), (768, 768)), ((3000, 400), (2400, 320))],
)
def test_the_1_5_follows_the_shape_of_the_image(image, size):
    geometry = shipped("cogvideox1.5_5b_i2v")
    assert geometry.size_for_image(*image) == size
    assert geometry.size_is_legal(*size)


def test_other_image_models_keep_their_size():
    assert shipped("cogvideox_5b_i2v").size_for_image(1080, 1920) == (480, 720)
    assert shipped("toy_i2v").size_for_image(100, 300) == (64, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"patch_size": [1, 9, 2]},
        {"patch_size": [1, 2, 9]},
        {"patch_size": [2, 2]},
        {"patch_size": "2"},
        {"num_frames": None},
        {"latent_width": -1},
        {"in_channels": True},
    ],
)
def test_unusable_parameters_are_named(change):
    model = yaml.safe_load((CONFIGS / "toy.yaml").read_text())["model"]
    with pytest.raises(InputError, match=f"network_config.params.{next(iter(change))} is .*give"):
        Geometry.from_network(model["network_config"]["params"] | change)


@pytest.mark.parametrize(("given", "expected"), [(2, (1, 2, 2)), ([2, 4, 4], (2, 4, 4)), ((1, 2, 2), (1, 2, 2))])
def test_patch_sizes_are_normalised(given, expected):
    assert normalize_patch_size(given) == expected


@pytest.mark.parametrize("given", [0, True, "2", None, [2, 2], [1, 2, 0], [1, 2, 2.0]])
def test_wrong_patch_sizes_are_refused(given):
    with pytest.raises(InputError, match=r"patch_size is .*; give .* \[time, height, width\]"):
        normalize_patch_size(given)
