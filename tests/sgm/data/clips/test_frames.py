import numpy as np
import pytest

from sgm.data.clips.frames import num_frames_4k1, select_frames, usual_gap
from sgm.util import InputError


def select(times, fps=8.0, frames=49, skip=3):
    return select_frames(times, fps=fps, max_num_frames=frames, skip=(skip, skip))


@pytest.mark.parametrize("source", [8, 12, 15, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120, 240, 480, 960])
@pytest.mark.parametrize("fps", [8, 16])
def test_frames_are_within_half_a_source_frame_of_the_configured_rate(source, fps):
    times = np.arange(round(9 * source)) / source + 0.4  # containers may start late
    chosen = select(times, fps=fps)
    wanted = times[3] + np.arange(49) / fps
    assert chosen.num_frames == len(chosen.indices) == 49
    assert chosen.indices[0] == 3, "the start is where skipping ends, never at random"
    assert np.abs(times[list(chosen.indices)] - wanted).max() <= 0.5 / source + 1e-6


def test_varying_frame_rate_plays_at_its_true_speed():
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.08, 300))
    half = usual_gap(times, default=0) / 2
    chosen = select(times, skip=0)
    for k, index in enumerate(chosen.indices):
        target = times[0] + k / 8
        nearest, shown = np.abs(times - target).argmin(), (times <= target).sum() - 1
        assert index == (nearest if times[nearest] - target <= half else shown)


def test_still_stretches_hold_the_frame_that_is_shown():
    recording = np.r_[np.arange(72) / 24, 8.0]  # nothing moves from 3 s to 8 s
    chosen = select(recording, frames=73, skip=0)
    assert chosen.indices[:24] == tuple(range(0, 72, 3)) and chosen.indices[24:64] == (71,) * 40
    assert chosen.indices[64] == 72 and chosen.num_frames == 65
    slides = select_frames(np.arange(3) * 2.0, fps=8, max_num_frames=49, end=6.0)
    assert slides.indices == (*[0] * 16, *[1] * 16, *[2] * 17) and slides.num_frames == 48
    last = select_frames([0.0, 0.1, 0.2], fps=8, max_num_frames=49, end=3.2)
    assert last.num_frames == 26, "until the end of the clip, not of the usual gap"


def test_a_tie_takes_the_earlier_frame():
    assert select(np.arange(200) / 12, fps=8, frames=5, skip=0).indices == (0, 1, 3, 4, 6)


@pytest.mark.parametrize("num_frames", [7, 20, 54])
def test_skipped_frames_are_never_taken(num_frames):
    indices = select(np.arange(num_frames) / 8).indices
    assert len(indices) == 49
    assert set(indices) == set(range(3, min(num_frames - 3, 52)))


def test_a_short_clip_repeats_its_last_frame():
    chosen = select(np.arange(30) / 30, frames=17, skip=0)
    assert chosen.num_frames == 8  # 7/8 of a second is within half a frame of the end
    assert chosen.indices == (0, 4, 7, 11, 15, 19, 22, 26, *[26] * 9)


def test_the_last_frame_stands_for_times_up_to_half_a_frame_after_it():
    assert select([0.0, 0.1], frames=5, skip=0).num_frames == 2  # 0.125 s is nearest to the frame at 0.1
    assert select([0.0, 0.1], fps=6, frames=5, skip=0).num_frames == 1


def test_as_many_frames_as_the_clip_has_at_its_own_rate():
    chosen = select(np.arange(17) / 8, frames=17, skip=0)
    assert chosen.indices == tuple(range(17))
    assert (chosen.num_frames, chosen.effective_fps) == (17, 8.0)


def test_a_slower_source_repeats_frames_and_lowers_the_effective_rate():
    chosen = select(np.arange(60) / 5, frames=17, skip=0)
    assert chosen.num_frames == 17
    assert chosen.effective_fps == pytest.approx(5, rel=0.2)
    assert select(np.arange(60) / 24, fps=23.976, frames=17, skip=0).effective_fps == 23.976


def test_a_single_frame_is_a_still_clip():
    assert select([0.0], frames=5, skip=0).indices == (0,) * 5


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (np.arange(6) / 8, "has 6 frames; skipping 3 at the start and 3 at the end leaves none"),
        (np.arange(50) / 1000, "1000 frames per second"),
        (np.zeros(50), "inf frames per second"),
    ],
)
def test_unusable_clips_are_refused(times, words):
    with pytest.raises(ValueError, match=words):
        select(times)


@pytest.mark.parametrize("value", [1, 5, 17, 49, 81])
def test_legal_frame_counts(value):
    assert num_frames_4k1(value) == value


@pytest.mark.parametrize(("value", "nearest"), [(48, "45 or 49"), (16, "13 or 17"), (80, "77 or 81"), (0, "give 1$")])
def test_other_frame_counts_name_the_nearest_legal_ones(value, nearest):
    with pytest.raises(InputError, match=nearest):
        num_frames_4k1(value)
