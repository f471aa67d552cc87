"""sgm.data.clips.decode: metadata of containers, and the frames of both decoders."""

import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import imageio_ffmpeg
import numpy as np
import pytest

from sgm.data.clips import decode
from sgm.data.clips.decode import ClipError, decode_all, probe, read_frames, scan
from sgm.inference.video import write_video


def picture_frames(num_frames=30, height=64, width=96):
    """A coloured corner, which shows rotation, over a grey level that encodes the frame index."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = 8 * np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    frames[:, :20, :30] = (200, 30, 60)
    return frames


def ffmpeg(*words):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, words)], check=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_video(path, picture_frames(), 30, crf=0)
    return path


@pytest.fixture
def variant(clip, tmp_path):
    """Return a function: ffmpeg's options → the clip rewritten with them."""

    def make(*options, name="variant.mp4", before=()):
        ffmpeg(*before, "-i", clip, *options, tmp_path / name)
        return tmp_path / name

    return make


def test_metadata_of_a_container(clip):
    info, times = scan(clip)
    assert (info.num_frames, info.height, info.width) == (30, 64, 96)
    assert info.fps == pytest.approx(30)
    assert info.duration == pytest.approx(1)
    assert np.allclose(times, np.arange(30) / 30)
    assert probe(clip) == info


@pytest.mark.parametrize(("rotation", "size"), [(90, (96, 64)), (180, (64, 96)), (270, (96, 64))])
def test_decoders_agree_on_upright_pictures(variant, rotation, size):
    turned = variant("-c", "copy", before=("-display_rotation", str(rotation)))
    info = probe(turned)
    assert (info.height, info.width) == size
    first = decode._read_av(turned, [0, 7, 29])
    assert first.shape == (3, *size, 3)
    assert np.array_equal(first, decode._read_decord(turned, [0, 7, 29], 30))
    expected = np.rot90(picture_frames()[[0, 7, 29]], rotation // 90, axes=(1, 2))
    assert np.abs(first[:, 2:-2, 2:-2].astype(int) - expected[:, 2:-2, 2:-2]).mean() < 5, "turned the wrong way"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bt709.mp4", ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709")),
        ("full_range.mp4", ("-pix_fmt", "yuvj420p")),
        ("b_frames.mp4", ("-bf", "3", "-g", "12")),
        ("clip.mkv", ("-c", "copy")),
        ("clip.avi", ("-c:v", "mpeg4")),
        ("clip.webm", ("-c:v", "libvpx-vp9")),
    ],
)
def test_decoders_agree_on_containers_and_colours(variant, name, options):
    path = variant(*options, name=name)
    indices = [0, 3, 11, 12, 28, 29]
    frames = decode._read_av(path, indices)
    assert np.abs(frames.astype(int) - decode._read_decord(path, indices, 30)).max() <= 1
    levels = frames[:, 40:, 50:].mean((1, 2, 3)) / 8
    assert levels.round().astype(int).tolist() == indices


def test_frames_cut_away_without_encoding_again_are_not_counted(variant):
    path = variant("-c", "copy", before=("-ss", "0.3"))
    info = probe(path)
    assert info.num_frames == 21
    levels = read_frames(path, range(21), 21)[:, 40:, 50:].mean((1, 2, 3)) / 8
    assert levels.round().astype(int).tolist() == list(range(9, 30))


def test_varying_times_are_read_from_the_packets(variant):
    path = variant("-vf", r"select='not(between(n\,10\,19))'", "-fps_mode", "vfr")
    times = scan(path)[1]
    assert np.allclose(times - times[0], np.r_[0:10, 20:30] / 30, atol=1e-3)


def test_pyav_steps_in_where_decord_is_missing_or_fails(clip, monkeypatch):
    expected = read_frames(clip, [1, 5], 30)
    monkeypatch.setitem(sys.modules, "decord", None)  # as if not installed
    assert np.array_equal(read_frames(clip, [1, 5], 30), expected)
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(decode, "_read_av", lambda *args: calls.append(args) or expected)
    read_frames(clip, [1, 5], 30)
    assert calls == [], "decord comes first"
    read_frames(clip, [1, 5], 31)  # it counts otherwise
    assert len(calls) == 1


def cut(path, share):
    content = path.read_bytes()
    return content[: int(len(content) * share)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.mp4", "not a video, or a damaged one"),
        ("text.mp4", "not a video, or a damaged one"),
        ("no_frames.mp4", "holds no video"),
        ("cut.mp4", "cut off or damaged"),
        ("cut.mkv", "ends after 0.* of 1.00 seconds"),
        ("missing.mp4", "No such file"),
    ],
)
def test_broken_clips_say_what_is_wrong(clip, variant, tmp_path, name, reason):
    path = tmp_path / name
    if name == "empty.mp4":
        path.touch()
    elif name == "text.mp4":
        path.write_text("a caption in the wrong folder\n" * 30)
    elif name == "no_frames.mp4":
        variant("-frames:v", "0", name=name)
    elif name == "cut.mp4":
        path.write_bytes(cut(clip, 0.6))
    elif name == "cut.mkv":
        path.write_bytes(cut(variant("-g", "5", name="whole.mkv"), 0.6))
    with pytest.raises(ClipError, match=reason) as caught:
        scan(path)
    assert str(path) in str(caught.value)


def test_damage_inside_is_found_by_decoding(clip, tmp_path):
    path = tmp_path / "damaged.mp4"
    content = bytearray(clip.read_bytes())
    start = len(content) * 3 // 4
    content[start : start + 200] = bytes(value ^ 0x5A for value in content[start : start + 200])
    path.write_bytes(content)
    assert scan(path)[0].num_frames == 30, "packets and the first frame are whole"
    with pytest.raises(ClipError):
        decode_all(path, 30)
    with pytest.raises(ClipError):
        read_frames(path, range(30), 30)
    decode_all(clip, 30)


def test_clip_errors_cross_processes():
    error = ForkingPickler.loads(ForkingPickler.dumps(ClipError("a.mp4", "is empty")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "is empty", "clip a.mp4: is empty")
