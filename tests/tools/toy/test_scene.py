import numpy as np
import pytest
import scene

from tests.marks import only

ALL = scene.combinations(held_out=False) + scene.combinations(held_out=True)


def clip_of(combination, seed=0):
    return scene.random_clip(combination, np.random.default_rng(seed))


def test_every_combination_is_either_trained_or_held_out():
    assert len(set(ALL)) == len(ALL) == len(scene.COLOURS) * len(scene.SHAPES) * len(scene.DIRECTIONS)
    assert len(scene.combinations(held_out=True)) == 12


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
def test_training_shows_every_pair_of_words(pair):
    shown = {tuple(c[i] for i in pair) for c in scene.combinations(held_out=False)}
    assert shown == {tuple(c[i] for i in pair) for c in ALL}


def test_rendering_follows_the_seed():
    first, again, other = (scene.render(clip_of(ALL[0], seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_rendered_clips_are_what_the_data_set_holds():
    video = scene.render(clip_of(ALL[5]))
    assert video.shape == (17, 64, 64, 3)
    assert video.dtype == np.float32
    assert video.min() >= 0.0
    assert video.max() <= 1.0


@pytest.mark.parametrize("size", scene.RADII)
def test_the_shape_never_touches_the_border(size):
    for seed, combination in enumerate(ALL):
        video = scene.render(scene.random_clip(combination, np.random.default_rng(seed), size))
        border = np.concatenate([video[:, [0, -1]].ravel(), video[:, :, [0, -1]].ravel()])
        assert np.allclose(border, scene.BACKGROUND), combination


def test_edges_are_anti_aliased():
    red = scene.render(clip_of(("red", "circle", "left")))[0, :, :, 0]
    full, background = scene.COLOURS["red"][0], scene.BACKGROUND
    between = (red > background + 0.05) & (red < full - 0.05)
    assert between.sum() > 20


@pytest.mark.parametrize("noise", [pytest.param(0.0, marks=pytest.mark.slow), 0.05])
def test_measuring_reads_back_every_caption(noise):
    rng = np.random.default_rng(7)
    for seed, combination in enumerate(ALL):
        video = scene.render(clip_of(combination, seed))
        measured = scene.measure(np.clip(video + rng.normal(0.0, noise, video.shape), 0.0, 1.0))
        assert (measured.colour, measured.shape, measured.direction) == combination


@pytest.mark.parametrize("size", scene.RADII)
def test_measuring_reads_back_sizes(size):
    for seed, combination in enumerate(ALL[::5]):
        clip = scene.random_clip(combination, np.random.default_rng(seed), size)
        assert clip.caption == f"a {f'{size} ' if size else ''}{scene.caption(*combination)[2:]}"
        measured = scene.measure(scene.render(clip))
        assert (measured.colour, measured.shape, measured.direction, measured.size) == (*combination, size)


def test_the_world_of_the_transformers_is_each_clip_once():
    clips = list(scene.lattice(ALL))
    assert len({*clips}) == len(clips) == len(ALL) * len(scene.RADII) * scene.LANES
    drawn = {scene.random_clip(ALL[0], np.random.default_rng(seed), "big") for seed in range(100)}
    assert drawn <= {*clips} and len(drawn) == scene.LANES


@pytest.mark.parametrize("size", only(["small"], scene.FREE_RADII))
def test_the_autoencoder_sees_other_places_and_sizes(size):
    lattice = {*scene.lattice(ALL)}
    for seed, combination in enumerate(ALL):
        clip = scene.free_clip(combination, np.random.default_rng(seed), size)
        assert clip not in lattice
        measured = scene.measure(scene.render(clip))
        assert (measured.colour, measured.shape, measured.direction) == combination


def test_land_covers_the_bottom_and_nothing_else():
    video = scene.render(clip_of(("blue", "square", "down")))
    with_land = scene.with_land(video, (0.15, 1.0, 0.2))
    assert np.array_equal(with_land[:, :-8], video[:, :-8])
    assert np.allclose(with_land[:, -8:], (0.15, 1.0, 0.2)) and not np.allclose(video[:, -8:], with_land[:, -8:])


def test_clips_take_sizes_in_turns():
    clips = scene.random_clips(ALL, np.random.default_rng(0), (None, "big"))
    sizes = [next(clips).size for _ in range(3 * len(ALL))]
    assert sizes == [None] * len(ALL) + ["big"] * len(ALL) + [None] * len(ALL)


def test_measured_travel_is_the_rendered_one():
    clip = clip_of(("blue", "square", "down"))
    assert scene.measure(scene.render(clip)).travel == pytest.approx(clip.travel, abs=0.5)


def test_an_empty_clip_shows_nothing():
    video = np.full((17, 64, 64, 3), scene.BACKGROUND, dtype=np.float32)
    assert scene.measure(video) == scene.Measurement(None, None, None, None, 0.0)


def test_a_shape_that_stands_still_has_no_direction():
    video = scene.render(clip_of(("green", "circle", "up")))
    measured = scene.measure(np.repeat(video[:1], len(video), axis=0))
    assert measured.colour == "green"
    assert measured.direction is None


def test_a_diagonal_move_has_no_direction():
    video = scene.render(scene.lattice_clip(("green", "circle", "up"), 0))
    shifted = np.stack([np.roll(frame, 2 * i, axis=1) for i, frame in enumerate(video)])
    assert scene.measure(shifted).direction is None


def test_a_colour_between_two_is_none_of_them():
    grey = scene.render(clip_of(("red", "square", "left"))).max(axis=-1, keepdims=True).repeat(3, axis=-1)
    assert scene.measure(grey).colour is None


def test_psnr_of_a_known_error():
    video = np.full((2, 4, 4, 3), 0.5)
    assert scene.psnr(video + 0.1, video) == pytest.approx(20.0)
    assert scene.psnr(video, video) == np.inf
