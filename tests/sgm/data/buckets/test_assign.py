"""Assignment of clips to buckets, and parsing of buckets."""

import numpy as np
import pytest

from sgm.config.yaml_files import ConfigError
from sgm.data.buckets.assign import NOWHERE, Bucket, ClipSizes, clip_sizes
from sgm.data.buckets.config import parse_buckets
from sgm.data.buckets.resolutions import AREAS
from sgm.data.clips.frames import select_frames
from sgm.data.rows import VideoInfo
from tests.geometries import PATCHED, ROTARY, SINCOS


def sizes(*clips: tuple[int, int, int]) -> ClipSizes:
    return ClipSizes(*(np.array(side) for side in zip(*clips, strict=True)))


def chosen(value, *clips: tuple[int, int, int], draws=None) -> list[str | None]:
    """The bucket of each clip (frames, height, width); `draws` are the same for all of them."""
    scheme = parse_buckets(value)
    row = [0.0] * scheme.num_draws if draws is None else draws
    indices = scheme.choose(sizes(*clips), np.tile(row, (len(clips), 1)))
    return [None if index == NOWHERE else str(scheme.buckets[index]) for index in indices]


def problems(value, geometry=None) -> str:
    with pytest.raises(ConfigError) as error:
        parse_buckets(value).supported_by(geometry)
    return str(error.value)


# Lengths


@pytest.mark.parametrize("rate", [4.0, 7.5, 8.0, 23.976, 25.0, 30.0, 60.0])
@pytest.mark.parametrize("skip", [(0, 0), (3, 3), (0, 11)])
def test_lengths_equal_the_number_of_selected_frames(rate, skip):
    counts = range(1, 200)
    infos = [VideoInfo(count, 0.0 if count == 1 else rate, count / rate, 480, 720) for count in counts]
    found = clip_sizes(infos, fps=8, skip=skip)
    for count, frames in zip(counts, found.frames, strict=True):
        if 1 < count <= sum(skip):
            assert frames == 0
        else:
            assert frames == select_frames(np.arange(count) / rate, fps=8, max_num_frames=1000, skip=skip).num_frames
    assert set(found.heights) == {480} and set(found.widths) == {720}


def test_clips_that_cannot_be_used_have_no_frames():
    infos = ["is broken", VideoInfo(100, 5000.0, 0.02, 480, 720), VideoInfo(10, 0.1, 100.0, 480, 720)]
    assert clip_sizes(infos, fps=8, skip=(0, 0)).frames.tolist() == [0, 0, 800], "a slide show is used"
    assert len(clip_sizes([], fps=8, skip=(0, 0))) == 0


# Lists


@pytest.mark.parametrize(
    ("clip", "bucket"),
    [
        ((49, 480, 720), "49x480x720"),
        ((48, 480, 720), "17x256x256"),  # not as long as 49
        ((400, 480, 720), "49x480x720"),
        ((3, 480, 720), "17x256x256"),  # fills none: the shortest
        ((60, 720, 480), "49x480x720"),  # nothing tall is there
        ((0, 480, 720), None),  # cannot be used
    ],
)
def test_the_longest_bucket_that_is_filled(clip, bucket):
    assert chosen(["49x480x720", "17x256x256"], clip) == [bucket]


@pytest.mark.parametrize(
    ("clip", "bucket"),
    [
        ((1080, 1920), "9x480x848"),
        ((1920, 1080), "9x848x480"),
        ((700, 720), "9x512x512"),
        ((480, 640), "9x480x720"),
        ((2, 2000), "9x480x848"),
    ],
)
def test_the_nearest_shape(clip, bucket):
    assert chosen(["9x480x720", "9x512x512", "9x480x848", "9x848x480"], (9, *clip)) == [bucket]


@pytest.mark.parametrize(
    ("clip", "bucket"),
    [((1080, 1920), "9x720x1280"), ((719, 1280), "9x368x640"), ((360, 640), "9x192x336"), ((90, 160), "9x192x336")],
)
def test_of_equal_shapes_the_largest_without_upscaling(clip, bucket):
    ladder = ["9x368x640", "9x720x1280", "9x192x336"]  # height / width 0.575, 0.5625, 0.571
    assert chosen(ladder, (9, *clip)) == chosen(ladder[::-1], (9, *clip)) == [bucket]


def test_a_cross_product():
    scheme = parse_buckets({"frames": [1, 49], "heights": [256, 480], "widths": 720, "batch_size": 4})
    assert [str(bucket) for bucket in scheme.buckets] == ["1x256x720", "1x480x720", "49x256x720", "49x480x720"]
    assert {bucket.batch_size for bucket in scheme.buckets} == {4}


def test_batch_sizes_of_a_list():
    scheme = parse_buckets(["49x480x720", {"shape": "17x256x256", "batch_size": 4}])
    assert scheme.buckets == (Bucket(49, 480, 720, None), Bucket(17, 256, 256, 4))


# Classes

LADDER = {"720p": {1: [0.5, 8], 49: [0.5, 1]}, "480p": {33: [0.4, 4], 49: [[0.3, 0.2], 2]}, "256": {1: [1.0, 16]}}
# Draws: 720p 49, 720p 1, 480p 49, 480p 33, 256 1; for each whether the count is considered, and whether it is kept.


@pytest.mark.parametrize(
    ("clip", "draws", "bucket"),
    [
        ((60, 1080, 1920), {}, "49x720x1280"),
        ((60, 1080, 1920), {1: 0.5}, "49x480x848"),  # spilled
        ((60, 1080, 1920), {1: 0.5, 4: 0.2}, "33x480x848"),  # 49 was passed over
        ((60, 1080, 1920), {1: 0.5, 5: 0.3}, None),  # not kept: 33 is not tried any more
        ((60, 1080, 1920), {1: 0.5, 4: 0.2, 7: 0.4}, None),
        ((40, 1080, 1920), {}, "33x480x848"),
        ((20, 1080, 1920), {}, None),  # 256 is for pictures
        ((1, 1080, 1920), {}, "1x720x1280"),
        ((1, 1080, 1920), {3: 0.5}, "1x192x336"),  # 480p has no pictures
        ((60, 480, 720), {}, "49x480x720"),  # 720p is too large
        ((60, 720, 480), {}, "49x720x480"),
        ((60, 200, 300), {}, None),
        ((1, 300, 200), {}, "1x320x208"),
    ],
)
def test_the_rule_of_classes(clip, draws, bucket):
    row = [draws.get(column, 0.0) for column in range(10)]
    assert chosen(LADDER, clip, draws=row) == [bucket]


def test_a_clip_needs_four_fifths_of_the_area():
    least = 0.8 * AREAS["480p"] / 800
    clips = (9, int(least), 800), (9, int(least) + 1, 800)
    assert chosen({"480p": {9: [1.0, 1]}}, *clips) == [None, "9x448x912"]


def test_a_class_that_passes_all_videos_on():
    assert chosen({"720p": {49: [0.0, 0]}, "480p": {49: [1.0, 1]}}, (49, 720, 1280)) == ["49x480x848"]


def test_reachable_clips():
    scheme = parse_buckets({"720p": {49: [0.0, 0], 33: [1, 1]}, "480p": {33: [[0.5, 0.5], 1], 17: [0.1, 1]}})
    clips = sizes((49, 720, 1280), (40, 720, 1280), (17, 720, 1280), (16, 720, 1280), (49, 200, 200), (0, 720, 1280))
    assert scheme.reachable(clips).tolist() == [True, True, True, False, False, False]
    alone = parse_buckets({"720p": {49: [0.0, 0], 33: [1, 1]}})
    assert alone.reachable(clips).tolist() == [False, True, False, False, False, False]
    fixed = parse_buckets(["49x480x720"])
    assert fixed.reachable(clips).tolist() == [True] * 5 + [False]


# Networks


def test_classes_keep_supported_sizes():
    scheme = parse_buckets({"480p": {49: [1.0, 1]}}).supported_by(ROTARY)
    assert [str(bucket) for bucket in scheme.buckets] == ["49x480x720"]
    assert len(parse_buckets({"480p": {77: [1.0, 1]}}).supported_by(PATCHED).buckets) == 21


@pytest.mark.parametrize(
    ("value", "geometry", "expected"),
    [
        (
            ["49x480x720", "49x256x256"],
            SINCOS,
            ["buckets.1: 49x256x256", "sincos positions of this network fit 480x720"],
        ),
        (["53x480x720"], ROTARY, ["buckets.0: 53 frames", "nearest legal: 49;"]),
        (["49x488x720", "1x1024x720"], ROTARY, ["buckets.0", "buckets.1", "nearest legal: 480x720"]),
        (
            {"720p": {49: [1.0, 1]}},
            ROTARY,
            ["buckets.720p: has no size", "up to 480, width: multiples of 16 up to 720"],
        ),
        ({"480p": {85: [1.0, 1]}}, PATCHED, ["buckets.480p.85: 85 frames", "nearest legal: 81;", "multiples of 4"]),
        ({"frames": [5], "heights": [8], "widths": [720]}, ROTARY, ["buckets: 5x8x720", "multiples of 16"]),
    ],
)
def test_unsupported_shapes_are_refused(value, geometry, expected):
    message = problems(value, geometry)
    assert all(text in message for text in expected), message


# Malformed


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], ["is empty"]),
        ({}, ["buckets: is {}"]),
        (None, ["buckets: is null"]),
        ([None, True], ["buckets.0: is null", "buckets.1: is true"]),
        ({"frames": [True], "heights": 64, "widths": 64}, ["buckets.frames: is [true]"]),
        ({"480p": None}, ["buckets.480p: is null"]),
        ({"480p": {49: None, 33: [None, 1], 17: [1, None]}}, ["49: is null", "probability null", "batch size null"]),
        ("49x480x720", ["buckets: is '49x480x720'"]),
        (["49x480", "50x480x720"], ["buckets.0: is '49x480'", "buckets.1: 50 frames", "give 49 or 53"]),
        (["9x480x720", "9x480x720"], ["buckets.1: 9x480x720 is given twice, as data.params.buckets.0"]),
        (["9x0x720"], ["buckets.0: 9x0x720 has a side of 0"]),
        (["0x16x16"], ["buckets.0: 0 frames", "give 1 or 5"]),
        ([{"shape": "9x32x32", "batch": 2}], ["buckets.0.batch: unknown key; did you mean 'batch_size'"]),
        ([{"shape": "9x32x32", "batch_size": 0}], ["has the batch size 0"]),
        ({"frames": [9], "heights": [32]}, ["buckets.widths: is missing"]),
        ({"frames": [9, 9], "heights": [32], "widths": ["a"]}, ["frames: names 9 twice", 'widths: is ["a"]']),
        ({"frames": [9], "heights": [32], "widths": [32], "fps": 8}, ["buckets.fps: unknown key"]),
        ({"480": {49: [1.0, 1]}}, ["buckets.480: '480' is no class", "did you mean '480p'"]),
        ({"480p": [1.0, 1]}, ["buckets.480p: is [1.0, 1]"]),
        ({"480p": {50: [1.0, 1]}}, ["buckets.480p.50: 50 frames"]),
        ({"480p": {"many": [1.0, 1]}}, ["buckets.480p.many: is not a number of frames"]),
        ({"480p": {49: 1.0}}, ["buckets.480p.49: is 1.0"]),
        ({"480p": {49: [1.5, 1]}}, ["buckets.480p.49: has the probability 1.5"]),
        ({"480p": {49: [[0.5, -0.1], 1]}}, ["has the probability [0.5, -0.1]"]),
        ({"480p": {1: [[0.5, 0.5], 1]}}, ["pictures have one length"]),
        ({"480p": {49: [1.0, 0]}}, ["has the batch size 0"]),
        ({"480p": {49: [0.0, 0]}}, ["keeps no clip"]),
        ({"256": {1: [1, 1]}, 256: {5: [1, 1]}}, ["buckets.256: is given twice"]),
    ],
)
def test_malformed_buckets(value, expected):
    message = problems(value)
    assert all(text in message for text in expected), message
