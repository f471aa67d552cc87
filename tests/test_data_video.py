"""SFTDataset: frames by timestamp, broken clips, random augmentation, lazy decoding, caches."""

import subprocess
from functools import cache
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import data_video
from data_video import SFTDataset
from sgm.data.cache import CachedTensors, Description, begin, write_shard
from sgm.data.clips.decode import ClipError
from sgm.data.loader import SampleStream, make_loader
from sgm.data.order import TrainingOrder
from sgm.inference.video import write_video
from sgm.util import InputError, instantiate_from_config

ROOT = Path(__file__).parents[1]


@cache
def encoded(num_frames, fps, size):
    """The bytes of a clip whose frame i has the grey value 5 * i; encoded once."""
    levels = 5 * np.arange(num_frames, dtype=np.uint8)
    with TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        write_video(path, np.broadcast_to(levels[:, None, None, None], (num_frames, *size, 3)), fps, crf=0)
        return path.read_bytes()


def clip(path, num_frames=40, fps=8, size=(64, 64)):
    """A clip whose frame i has the grey value 5 * i, with a caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(num_frames, fps, size))
    caption = Path(str(path).replace("/videos/", "/labels/")).with_suffix(".txt")
    caption.parent.mkdir(parents=True, exist_ok=True)
    caption.write_text(f"clip {path.stem}\nin two lines")
    return path


def dataset(folder, **more):
    return SFTDataset(data_dir=folder, **({"video_size": (32, 32), "max_num_frames": 9, "skip_frms_num": 0} | more))


def frames_of(sample):
    """Return the indices of the source frames in a sample."""
    return ((sample["mp4"].mean((1, 2, 3)) + 1) * 127.5 / 5).round().int().tolist()


def test_a_sample(tmp_path):
    path = clip(tmp_path / "videos/a.mp4", size=(48, 80))
    sample = dataset(tmp_path)[0]
    assert sample["mp4"].shape == (9, 3, 32, 32)
    assert sample["mp4"].dtype == torch.float32
    assert sample["mp4"].is_contiguous()
    assert -1 <= sample["mp4"].min() < sample["mp4"].max() <= 1
    assert {key: sample[key] for key in ("txt", "num_frames", "fps", "path")} == {
        "txt": "clip a in two lines",
        "num_frames": 9,
        "fps": 8.0,
        "path": str(path),
    }
    assert frames_of(sample) == list(range(9))


@pytest.mark.parametrize("source", [24, 30, 23.976, 12])
def test_frames_of_any_source_come_at_the_configured_rate(tmp_path, source):
    clip(tmp_path / "videos/a.mp4", num_frames=50, fps=source)
    shown = np.array(frames_of(dataset(tmp_path, fps=8, skip_frms_num=3)[0]))
    assert shown[0] == 3
    wanted = 3 / source + np.arange(9) / 8
    real = wanted <= 46 / source  # the last frame not skipped
    assert real.sum() >= 8 if source != 12 else real.all()
    assert np.abs(shown[real] / source - wanted[real]).max() <= 0.5 / source + 1e-6


def test_a_short_clip_repeats_its_last_frame(tmp_path):
    clip(tmp_path / "videos/a.mp4", num_frames=12)
    sample = dataset(tmp_path, skip_frms_num=3.0)[0]
    assert frames_of(sample) == [3, 4, 5, 6, 7, 8, 8, 8, 8]
    assert sample["num_frames"] == 6


def broken_set(root):
    """Write 20 clips, five of them unusual; return the paths of the four unusable ones."""
    for index in range(20):
        clip(root / f"videos/{index:02}.mp4", num_frames=12, fps=23.976 if index == 11 else 8)
    videos = root / "videos"
    whole = (videos / "03.mp4").read_bytes()
    (videos / "03.mp4").write_bytes(whole[: len(whole) * 3 // 5])
    (videos / "07.mp4").write_bytes(b"")
    (videos / "08.mp4").write_text("a text file")
    nothing = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", "color=s=64x64", "-t", "0"]
    subprocess.run([*nothing, str(videos / "15.mp4")], check=True)
    return {str(videos / f"{name}.mp4") for name in ("03", "07", "08", "15")}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_clips_among_twenty_are_named_and_replaced(tmp_path, num_workers):
    bad = broken_set(tmp_path)
    clips = dataset(tmp_path)
    loader = make_loader(
        SampleStream([clips], TrainingOrder([20], seed=0)),
        first=0,
        stop=40,
        rank=0,
        world=1,
        micro_batch=4,
        num_workers=num_workers,
    )
    batches = list(loader)
    assert sum(len(batch["number"]) for batch in batches) == 40
    failures = [failure for batch in batches for failure in batch["failures"]]
    assert {path for path, _ in failures} == bad, "an odd but true frame rate is fine"
    assert all(reason for _, reason in failures)
    assert not bad & {path for batch in batches for path in batch["path"]}


def test_checking_finds_the_same_clips_before_training(tmp_path):
    bad = broken_set(tmp_path)
    clips = dataset(tmp_path)
    reports = clips.check(num_threads=2)
    assert {report.path for report in reports if report.problems} == bad
    good = clips.without(bad)
    assert len(good) == 16
    assert set(good.paths) == set(clips.paths) - bad
    assert len(clips) == 20, "the data set itself stays as it is"
    assert all(not report.problems for report in good.check(decode=True))
    assert clips.select([4, 2]).captions == ["clip 04 in two lines", "clip 02 in two lines"]


def corner(path):
    """A clip with aspect ratio 2:1 and a dark left half; brightness rises with time and height."""
    frames = np.zeros((9, 64, 128, 3), np.uint8)
    frames += (5 * np.arange(9, dtype=np.uint8))[:, None, None, None]
    frames[:, :, 64:] += 150
    frames[:, 32:] += 40
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, 8, crf=0)
    path.with_suffix(".txt").write_text("a bright half")
    return path


def draw(number):
    return torch.Generator().manual_seed(number)


def test_a_clip_is_mirrored_whole_or_not_at_all(tmp_path):
    corner(tmp_path / "a.mp4")
    clips = dataset(tmp_path, random_flip=0.5, video_size=(32, 64))
    plain = clips[0]["mp4"]
    assert plain[..., :16].mean() < plain[..., -16:].mean()
    seen = [clips.sample(0, draw(number))["mp4"] for number in range(12)]
    assert {torch.equal(one, plain) for one in seen} == {True, False}
    assert all(torch.equal(one, plain) or torch.equal(one, plain.flip(-1)) for one in seen)


def test_reshape_modes(tmp_path):
    corner(tmp_path / "a.mp4")
    center, none = (dataset(tmp_path, reshape_mode=mode)[0]["mp4"] for mode in ("center", "none"))
    clips = dataset(tmp_path, reshape_mode="random")
    assert torch.equal(clips[0]["mp4"], center), "nothing is random without a generator"
    cuts = [clips.sample(0, draw(number))["mp4"] for number in range(8)]
    assert len({float(cut.mean()) for cut in cuts}) > 4, "another part in each sample"
    assert all((cut[1:] - cut[:-1]).mean((1, 2, 3)).std() < 0.01 for cut in cuts), "the same part in all frames"
    assert none[:, :, :, :12].max() < none[:, :, :, -12:].min() and none.shape == center.shape
    wide = clips.sample(0, None, (5, 16, 32))["mp4"]
    assert wide.shape == (5, 3, 16, 32)


def test_captions_get_a_token_or_are_dropped(tmp_path):
    corner(tmp_path / "a.mp4")
    clips = dataset(tmp_path, id_token="qfx", caption_dropout=0.4, max_num_frames=1)
    assert clips.captions == ["qfx a bright half"] and clips[0]["txt"] == "qfx a bright half"
    seen = [clips.sample(0, draw(number))["txt"] for number in range(60)]
    assert {*seen} == {"", "qfx a bright half"} and 12 <= seen.count("") <= 36


def test_one_option_does_not_change_the_draws_of_another(tmp_path):
    corner(tmp_path / "a.mp4")
    flips = []
    for more in ({}, {"reshape_mode": "random"}, {"caption_dropout": 0.5}):
        clips = dataset(tmp_path, random_flip=0.5, **more)
        samples = [clips.sample(0, draw(number))["mp4"] for number in range(8)]
        flips.append([bool(one[..., :8].mean() > one[..., -8:].mean()) for one in samples])
    assert flips[0] == flips[2] and len({*flips[0]}) == 2


def test_draws_depend_on_the_number_of_the_sample_alone(tmp_path):
    for name in "ab":
        corner(tmp_path / f"{name}.mp4")
    clips = dataset(tmp_path, random_flip=0.5, caption_dropout=0.5, reshape_mode="random")
    stream = SampleStream([clips], TrainingOrder([2], seed=3))
    seen = {}
    for first, world, rank, num_workers in ((0, 1, 0, 0), (0, 2, 0, 0), (0, 2, 1, 0), (4, 1, 0, 2)):
        numbers = {"first": first, "stop": 12, "rank": rank, "world": world, "micro_batch": 2}
        for batch in make_loader(stream, **numbers, num_workers=num_workers):
            assert batch["image"] == [None, None]
            for number, video, text in zip(batch["number"], batch["mp4"], batch["txt"], strict=True):
                same = seen.setdefault(number, (video, text))
                assert torch.equal(same[0], video) and same[1] == text
    assert len(seen) == 12 and len({float(video.mean()) for video, _ in seen.values()}) > 6, "samples of a clip differ"


def test_frames_are_skipped_at_either_end(tmp_path):
    clip(tmp_path / "videos/a.mp4", num_frames=12)
    assert frames_of(dataset(tmp_path, skip_frames_start=5)[0])[:3] == [5, 6, 7]
    assert dataset(tmp_path, skip_frames_end=5)[0]["num_frames"] == 7
    both = dataset(tmp_path, skip_frms_num=2, skip_frames_end=6)[0]
    assert frames_of(both)[0] == 2 and both["num_frames"] == 4


def test_a_clip_without_a_caption_cannot_be_used_unless_allowed(tmp_path):
    clip(tmp_path / "videos/a.mp4")
    (tmp_path / "labels/a.txt").unlink()
    with pytest.raises(ClipError, match=r"a\.mp4: its caption .* is missing"):
        dataset(tmp_path)[0]
    assert dataset(tmp_path, allow_missing_captions=True)[0]["txt"] == ""


def test_a_clip_that_is_too_short_to_skip_is_a_clip_error(tmp_path):
    clip(tmp_path / "videos/a.mp4", num_frames=6)
    with pytest.raises(ClipError, match="leaves none"):
        dataset(tmp_path, skip_frms_num=3)[0]


def test_nothing_is_decoded_before_it_is_asked_for(tmp_path, monkeypatch):
    for name in "abc":
        clip(tmp_path / f"videos/{name}.mp4")
    opened = []
    scan, read = data_video.scan, data_video.read_frames
    monkeypatch.setattr(data_video, "scan", lambda path: opened.append(path.stem) or scan(path))
    monkeypatch.setattr(
        data_video, "read_frames", lambda path, indices, n: opened.append(list(indices)) or read(path, indices, n)
    )
    clips = dataset(tmp_path, max_num_frames=5)
    assert opened == []
    clips[1]
    assert opened == ["b", [0, 1, 2, 3, 4]], "frames that are not taken are not kept"


def test_it_crosses_processes(tmp_path):
    clip(tmp_path / "videos/a.mp4")
    copied = ForkingPickler.loads(ForkingPickler.dumps(dataset(tmp_path)))
    assert torch.equal(copied[0]["mp4"], dataset(tmp_path)[0]["mp4"])


def test_the_parameters_of_released_files():
    params = {"video_size": [64, 64], "fps": 8, "max_num_frames": 17, "skip_frms_num": 3.0}
    section = {"target": "data_video.SFTDataset", "params": params}
    toy = instantiate_from_config(section, data_dir=str(ROOT / "assets/toy"))
    assert len(toy) == 60
    sample = toy[0]
    assert (sample["txt"], sample["num_frames"]) == ("a green square moves down", 11)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_num_frames": 48}, "45 or 49"),
        ({"fps": 0}, "fps is 0"),
        ({"video_size": (0, 64)}, r"video_size is \[0, 64\]"),
        ({"skip_frms_num": 2.5}, "skip_frms_num is 2.5"),
        ({"skip_frms_num": -1}, "skip_frms_num is -1"),
        ({"data_dir": "nowhere"}, "'nowhere' does not exist"),
        ({"skip_frames_end": 0.5}, "skip_frames_end is 0.5"),
        ({"random_flip": 1.5}, "random_flip is 1.5; give a probability"),
        ({"caption_dropout": -1}, "caption_dropout is -1"),
        ({"reshape_mode": "crop"}, "reshape_mode is 'crop'; give one of center, random, none"),
    ],
)
def test_unusable_parameters_are_refused(params, words):
    with pytest.raises(InputError, match=words):
        SFTDataset(**({"data_dir": ROOT / "assets/toy", "video_size": (64, 64)} | params))


def from_cache(clips, folder, **failed):
    """Return the data set with clips from a cache; `failed` maps names of clips to reasons of failures."""
    keys = clips.cache_keys()
    made = Description("latents", "fp32", {"precision": "fp32"}, (tuple(keys.values()),))
    begin(folder, made)
    write_shard(folder, made, 0, [failed.get(Path(path).stem, torch.zeros(8, 3, 4, 4)) for path in keys])
    return clips.cached(CachedTensors(folder, "latents"), keys, images=None, image_keys={}, first_frames=False)


def test_failed_clips_of_a_cache_are_treated_as_without_a_cache(tmp_path, monkeypatch):
    """A damaged clip missed by the check is replaced when it is read, so sample numbers do not change."""
    for name in "abcd":
        clip(tmp_path / f"videos/{name}.mp4", num_frames=9)
    (tmp_path / "videos/c.mp4").write_text("no video")
    plain = dataset(tmp_path)
    cached = from_cache(plain, tmp_path / "cache", b="frame 7 is damaged", c="is not a video")
    assert len(cached) == len(plain) and cached.paths == plain.paths
    assert [report.problems for report in cached.check()] == [report.problems for report in plain.check()]
    assert [report.problems for report in cached.row_reports()] == [()] * 4
    bad = [report.path for report in cached.check() if report.problems]
    assert bad == [str(tmp_path / "videos/c.mp4")]

    whole = SFTDataset.sample

    def damaged(self, index, generator, shape=None):
        if self._cache is None and self.paths[index].endswith("b.mp4"):
            raise ClipError(self.paths[index], "frame 7 is damaged")
        return whole(self, index, generator, shape)

    monkeypatch.setattr(SFTDataset, "sample", damaged)
    shown = []
    for clips in (plain.without(bad), cached.without(bad)):
        stream = SampleStream([clips], TrainingOrder([len(clips)], seed=2))
        samples = [stream.sample(number) for number in range(9)]
        shown.append([(Path(sample["path"]).stem, sample["failures"]) for sample in samples])
    assert shown[0] == shown[1] and sum(bool(failures) for _, failures in shown[0]) == 3


def test_clips_from_a_cache_stay_closed(tmp_path, monkeypatch):
    clip(tmp_path / "videos/a.mp4", num_frames=9)
    cached = from_cache(dataset(tmp_path), tmp_path / "cache")
    monkeypatch.setattr(data_video, "check_rows", None)
    assert [report.problems for report in cached.check()] == [()]
