"""sgm.data.clips.decode: metadata of containers, and frames by their times."""

import os
import socket
import struct
import subprocess
from multiprocessing.reduction import ForkingPickler

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from sgm.data.clips import decode
from sgm.data.clips.decode import ClipError, decode_all, probe, read_frames, scan
from sgm.data.formats.folder import list_folder
from sgm.data.formats.registry import list_rows
from sgm.data.rows import VIDEO_SUFFIXES
from sgm.inference.video import write_video
from sgm.util import InputError
from tests.sgm.data.clips.fields import h264_fields, write_fields


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
    info, times, *_ = scan(clip)
    assert (info.num_frames, info.height, info.width) == (30, 64, 96)
    assert info.fps == pytest.approx(30)
    assert info.duration == pytest.approx(1)
    assert np.allclose(times, np.arange(30) / 30)
    assert probe(clip) == info


@pytest.mark.parametrize(("rotation", "size"), [(90, (96, 64)), (180, (64, 96)), (270, (96, 64))])
def test_pictures_are_upright(variant, rotation, size):
    turned = variant("-c", "copy", before=("-display_rotation", str(rotation)))
    scanned = scan(turned)
    assert (scanned.info.height, scanned.info.width) == size
    first = read_frames(turned, [0, 7, 29], scanned)
    assert first.shape == (3, *size, 3)
    expected = np.rot90(picture_frames()[[0, 7, 29]], rotation // 90, axes=(1, 2))
    assert np.abs(first[:, 2:-2, 2:-2].astype(int) - expected[:, 2:-2, 2:-2]).mean() < 5, "turned the wrong way"


@pytest.mark.parametrize(("name", "codec"), [("part.mkv", "copy"), ("part.mpg", "mpeg1video")])
def test_a_stream_whose_times_begin_again_is_refused(variant, tmp_path, name, codec):
    part = variant("-c:v", codec, name=name, before=("-stream_loop", "1"))
    assert scan(part).info.num_frames > 50
    (joined := tmp_path / f"joined{part.suffix}").write_bytes(2 * part.read_bytes())
    with pytest.raises(ClipError, match=r"its times begin again after (59|60) frames, as where files were joined"):
        scan(joined)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", ["h", "v"])
def test_mirrored_pictures_are_those_of_ffmpeg(variant, tmp_path, turn, mirror):
    mirrored = variant("-c", "copy", before=("-display_rotation", str(turn), f"-display_{mirror}flip"))
    ffmpeg("-i", mirrored, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", tmp_path / "raw")
    scanned = scan(mirrored)
    (first,) = read_frames(mirrored, [0], scanned)
    assert first.shape == ((96, 64, 3) if turn % 180 else (64, 96, 3))
    shown = np.frombuffer((tmp_path / "raw").read_bytes(), np.uint8).reshape(first.shape)
    assert np.abs(first.astype(int) - shown).mean() < 5


def test_a_clip_that_is_turned_by_less_than_a_quarter_is_refused(variant):
    with pytest.raises(ClipError, match="is shown turned by 30 degrees; encode it again"):
        scan(variant("-c", "copy", before=("-display_rotation", "30")))


def levels(path, indices, scanned=None):
    """Return the numbers that frames show."""
    frames = read_frames(path, indices, scanned or scan(path))
    return (frames[:, frames.shape[1] * 5 // 8 :, 50:].mean((1, 2, 3)) / 8).round().astype(int).tolist()


X264 = ("-c:v", "libx264", "-bf", "3", "-g", "12", "-x264-params")
X265 = ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=12")
MPEG2 = ("-c:v", "mpeg2video", "-bf", "2", "-g", "12", "-q:v", "2")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bt709.mp4", ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709")),
        ("full_range.mp4", ("-pix_fmt", "yuvj420p")),
        ("closed.mp4", (*X264, "open-gop=0")),
        ("open.mp4", (*X264, "open-gop=1")),
        ("open.mkv", (*X264, "open-gop=1:b-pyramid=strict")),
        ("refresh.mov", (*X264, "intra-refresh=1")),
        ("fragments.mp4", (*X264, "open-gop=1", "-movflags", "frag_keyframe+empty_moov")),
        ("h264.avi", (*X264, "open-gop=0")),
        ("asp.avi", ("-c:v", "mpeg4", "-bf", "2", "-g", "12")),
        ("asp.mp4", ("-c:v", "mpeg4", "-bf", "2")),
        ("10bit.mp4", (*X265, "-pix_fmt", "yuv420p10le")),
        ("open265.mkv", ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=12:open-gop=1")),
        ("clip.webm", ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-deadline", "realtime")),
        ("av1.mp4", ("-c:v", "libaom-av1", "-cpu-used", "8", "-usage", "realtime")),
        ("mpeg2.mpg", MPEG2),
        ("mpeg2.ts", MPEG2),
        ("open.ts", (*X264, "open-gop=1")),
        ("open.flv", (*X264, "open-gop=1")),
        ("open.3gp", (*X264, "open-gop=1")),
        ("clip.wmv", ("-c:v", "wmv2", "-q:v", "2")),
        ("clip.ogv", ("-c:v", "libtheora", "-q:v", "10")),
    ],
)
def test_chosen_frames_are_read_in_every_container_and_structure(variant, name, options):
    path = variant(*options, name=name)
    indices = [1, 3, 10, 11, 12, 13, 25, 28]
    assert path.suffix in VIDEO_SUFFIXES and levels(path, indices) == indices
    assert levels(path, range(30)) == list(range(30))
    decode_all(path, scan(path))


def test_frames_cut_away_without_encoding_again_are_not_counted(variant):
    path = variant("-c", "copy", before=("-ss", "0.3"))
    assert probe(path).num_frames == 21
    assert levels(path, range(21)) == list(range(9, 30))


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_clips_cut_inside_an_open_gop_start_with_what_can_be_decoded(variant, tmp_path, name):
    whole = variant(*X264, "open-gop=1", name=f"whole{name[-4:]}")
    ffmpeg("-ss", "0.5", "-i", whole, "-c", "copy", tmp_path / name)
    scanned = scan(tmp_path / name)
    shown = levels(tmp_path / name, range(len(scanned.times)), scanned)
    assert shown == list(range(30))[-len(shown) :] and len(shown) >= 15
    decode_all(tmp_path / name, scanned)


def test_varying_times_are_read_from_the_packets(variant):
    path = variant("-vf", r"select='not(between(n\,10\,19))'", "-fps_mode", "vfr")
    times = scan(path).times
    assert np.allclose(times - times[0], np.r_[0:10, 20:30] / 30, atol=1e-3)


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.avi"])
def test_a_clip_that_starts_late_is_whole(variant, name):
    info = probe(variant("-c:v", "libx264", "-output_ts_offset", "5", name=name))
    assert (info.num_frames, info.duration) == (30, pytest.approx(1, abs=0.01))


def test_the_stream_is_the_video_not_a_cover(clip, tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "cover.png")
    inputs = ("-i", tmp_path / "cover.png", "-i", clip, "-map", "0", "-map", "1", "-c", "copy")
    for name in ("cover.mkv", "cover.mp4"):
        ffmpeg(*inputs, "-disposition:v:0", "attached_pic", tmp_path / name)
        info = probe(tmp_path / name)
        assert (info.num_frames, info.height, info.width) == (30, 64, 96)
    ffmpeg("-i", tmp_path / "cover.png", "-c", "copy", "-disposition:v:0", "attached_pic", tmp_path / "only.mp4")
    with pytest.raises(ClipError, match="holds no video, only a cover picture"):
        scan(tmp_path / "only.mp4")


@pytest.mark.parametrize(("name", "ratio", "width"), [("wide.mp4", "2", 192), ("narrow.mkv", "8/9", 85)])
def test_pixels_become_square(variant, name, ratio, width):
    path = variant("-vf", f"setsar={ratio}", "-c:v", "libx264", name=name)
    scanned = scan(path)
    assert (scanned.info.height, scanned.info.width) == (64, width)
    assert read_frames(path, [2], scanned).shape == (1, 64, width, 3)
    turned = path.with_stem("turned")
    ffmpeg("-display_rotation", "90", "-i", path, "-c", "copy", turned)
    assert read_frames(turned, [2], scan(turned)).shape == (1, width, 64, 3)


def test_interlaced_frames_are_deinterlaced(variant):
    fields = "geq=lum='255*mod(Y+N,2)':cb=128:cr=128,setfield=tff"  # fields of opposite brightness
    path = variant("-vf", fields, "-c:v", "libx264", "-flags", "+ildct+ilme", name="fields.mp4")
    scanned = scan(path)
    frames = read_frames(path, [4, 20], scanned).astype(int)
    assert scanned.interlaced and np.abs(np.diff(frames[:, 4:-4], axis=1)).mean() < 20
    assert len(scanned.times) == 30 and not scan(variant("-c", "copy")).interlaced


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_two_fields_in_two_packets_are_one_frame(suffix, tmp_path):
    levels = range(40, 100, 6)
    write_fields(path := tmp_path / f"fields.{suffix}", levels)
    scanned = scan(path)
    info, frames = scanned.info, read_frames(path, range(10), scanned)
    assert (info.num_frames, info.height, info.fps, info.duration) == pytest.approx((10, 64, 25, 0.4), rel=0.01)
    grey = [round((level - 16) * 255 / 219) for level in levels]  # of limited range
    assert scanned.interlaced and np.abs(frames - np.array(grey)[:, None, None, None]).max() <= 2
    decode_all(path, scanned)


def test_fields_without_times_or_as_frames_are_refused(variant, tmp_path):
    (path := tmp_path / "fields.h264").write_bytes(h264_fields([40, 80, 120]))
    with pytest.raises(ClipError, match="fields .* without presentation times; deinterlace it first: .* bwdif"):
        scan(path)
    options = ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "interlace=tff:log-level=error")
    with pytest.raises(ClipError, match="holds each field as a frame .*; deinterlace it first: .* weave,bwdif"):
        scan(variant("-vf", "separatefields", "-frames:v", "4", *options))


@pytest.mark.parametrize(
    ("name", "options"),
    [("alpha.mov", ("-c:v", "png")), ("alpha.webm", ("-c:v", "libvpx-vp9", "-cpu-used", "8"))],
)
def test_transparent_parts_are_white(variant, name, options):
    alpha = "format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='255*lt(X,48)',format=" + (
        "rgba" if name.endswith("mov") else "yuva420p"
    )
    path = variant("-vf", alpha, *options, name=name)
    frames = read_frames(path, [3], scan(path))
    assert frames[0, 30:, 60:].min() >= 250 and frames[0, 30:, :40].max() < 40


def test_frames_above_the_limit_are_refused_from_the_header(clip, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 95)
    monkeypatch.setattr(decode, "_decode", None)  # nothing is decoded
    with pytest.raises(ClipError, match="has frames of 64x96, above 6,080 pixels"):
        scan(clip)


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.mp4").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.mp4"))
    for name, kind in (("pipe.mp4", "named pipe"), ("pipe.png", "named pipe"), ("folder.mp4", "folder")):
        with pytest.raises(ClipError, match=f"it is a {kind}, not a file"):
            scan(tmp_path / name)
    with pytest.raises(ClipError, match="it is a socket"):
        scan(tmp_path / "socket.mp4")
    os.mkfifo(tmp_path / "pipe.txt")
    problems = {row.path.name: row.problem for row in list_folder(tmp_path)}
    assert "it is a named pipe" in problems["pipe.mp4"], "nor is a caption"
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(InputError, match="it is a named pipe"):
        list_rows(tmp_path, format="webdataset")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    with pytest.raises(ClipError, match="it is a device"):
        scan(tmp_path / "device.mp4")


def test_frames_of_another_shape_are_refused(clip):
    scanned = scan(clip)._replace(stored=(96, 64))
    with pytest.raises(ClipError, match="its frames change from 96x64 to 64x96; cut it there"):
        read_frames(clip, [0], scanned)


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
    scanned = scan(path)
    assert scanned.info.num_frames == 30, "packets and the first frame are whole"
    with pytest.raises(ClipError, match="of its 30 frames, the first at .* s, cannot be decoded"):
        decode_all(path, scanned)
    with pytest.raises(ClipError, match="its frame at .* s cannot be decoded"):
        read_frames(path, range(30), scanned)
    decode_all(clip, scanned)
    assert levels(path, [0, 5], scanned) == [0, 5], "what comes before the damage is whole"


def test_clip_errors_cross_processes():
    error = ForkingPickler.loads(ForkingPickler.dumps(ClipError("a.mp4", "is empty")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "is empty", "clip a.mp4: is empty")


@pytest.mark.parametrize(
    ("name", "options", "stated"),
    [
        ("some.ts", ("-bsf:v", "setts=pts='if(eq(mod(N,5),1),NOPTS,PTS)'"), 24),
        ("one.mpg", (), 1),
        ("raw.h264", (), 0),
    ],
)
def test_frames_without_times_are_refused_not_left_out(variant, name, options, stated):
    path = variant(*X264, "open-gop=0", *options, name=name)
    with pytest.raises(ClipError, match=f"states {stated} presentation times for its 30 frames; encode it again"):
        scan(path)


@pytest.mark.parametrize(
    ("edits", "shown", "start"),
    [
        ([(1 / 3, None), (0.2, 3)], [3, 4, 5, 6, 7, 8], 10),
        ([(0.3, 20), (0.1, 2)], [20, 21, 22, 23, 24, 25, 26, 27, 28, 2, 3, 4], 0),
    ],
)
def test_edit_lists_say_what_is_shown(variant, edits, shown, start):
    """Edits are (seconds, first frame); None shows nothing, for a delay. FFmpeg may end an edit a frame late."""
    path = variant("-c:v", "libx264", "-bf", "0", "-g", "12", "-video_track_timescale", "3000")
    data = bytearray(path.read_bytes())  # the index is at the end: what changes its length moves no frame
    place, scale = data.index(b"elst") - 4, struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    entries = (struct.pack(">IiI", round(t * scale), -1 if n is None else n * 100, 1 << 16) for t, n in edits)
    box = b"elst" + struct.pack(">II", 0, len(edits)) + b"".join(entries)
    grown = len(box) + 4 - struct.unpack_from(">I", data, place)[0]
    data[place : place + len(box) + 4 - grown] = struct.pack(">I", len(box) + 4) + box
    for name in (b"edts", b"trak", b"moov"):
        outer = data.rindex(name) - 4
        struct.pack_into(">I", data, outer, struct.unpack_from(">I", data, outer)[0] + grown)
    path.write_bytes(data)
    scanned = scan(path)
    assert levels(path, range(len(scanned.times)), scanned)[: len(shown)] == shown
    assert scanned.times[0] == pytest.approx(start / 30, abs=0.01) and len(scanned.times) <= len(shown) + 1
