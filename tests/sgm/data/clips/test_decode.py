"""sgm.data.clips.decode: metadata of containers, and frames by their times."""

import errno
import os
import socket
import subprocess
from multiprocessing.reduction import ForkingPickler

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, features

from sgm.data.clips import decode
from sgm.data.clips.decode import ClipError, decode_all, each_frame, probe, read_frames, scan
from sgm.data.formats.folder import list_folder
from sgm.data.formats.registry import list_rows
from sgm.data.rows import VIDEO_SUFFIXES
from sgm.inference.video import write_video
from sgm.util import InputError
from tests.sgm.data.clips.boxes import with_aperture, with_edits, with_pixel_crop
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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("part.mp4", ("-c", "copy")),
        ("first.mp4", ("-c", "copy", "-movflags", "faststart")),
        ("part.mov", ("-c", "copy")),
        ("part.3gp", ("-c", "copy")),
        ("part.flv", ("-c", "copy")),
        ("part.wmv", ("-c:v", "wmv2")),
    ],
)
def test_a_file_behind_the_first_is_refused(variant, tmp_path, name, options):
    part = variant(*options, name=name)
    assert scan(part).info.num_frames == 30
    (joined := tmp_path / f"joined{part.suffix}").write_bytes(2 * part.read_bytes())
    with pytest.raises(ClipError, match="is several files joined to one, of which only the first is played"):
        scan(joined)


def test_fragments_may_repeat_their_header(variant):
    path = variant("-c", "copy", "-movflags", "frag_keyframe+empty_moov")
    content = path.read_bytes()
    header = content[content.index(b"moov") - 4 : content.index(b"moof") - 4]
    path.write_bytes(content + header)
    assert scan(path).info.num_frames == 30


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


@pytest.mark.parametrize("name", ["cropped.mp4", "cropped.mkv"])
@pytest.mark.parametrize("turn", [0, 90])
def test_what_the_container_crops_is_not_shown(variant, name, turn):
    path = variant("-c", "copy", name=name, before=("-display_rotation", str(turn)))
    whole = read_frames(path, [0, 9], scan(path))
    data = path.read_bytes()
    path.write_bytes(
        with_aperture(data, 80, 48, 5, -6) if name.endswith("mp4") else with_pixel_crop(data, 5, 11, 10, 6)
    )
    scanned = scan(path)
    expected = whole[:, 6:86, 5:53] if turn else whole[:, 5:53, 10:90]
    assert (scanned.info.height, scanned.info.width) == expected.shape[1:3]
    assert np.array_equal(read_frames(path, [0, 9], scanned), expected)
    (small,) = decode.each_frame(path, [0], scanned, size=(24, 20))
    assert np.abs(small.astype(int).mean((0, 1)) - expected[0].mean((0, 1))).max() < 5


@pytest.mark.parametrize("aperture", [(200, 48), (80, 0), (-80, 48), (80, 48, 40), (80, 48, 0, -40)])
def test_an_aperture_outside_of_the_frame_is_passed_over(variant, aperture):
    path = variant("-c", "copy")
    path.write_bytes(with_aperture(path.read_bytes(), *aperture))
    assert (probe(path).height, probe(path).width) == (64, 96)


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


@pytest.mark.skipif(not features.check("avif"), reason="Pillow cannot write AVIF")
def test_pictures_of_several_parts_are_refused(tmp_path):
    picture = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    picture.save(tmp_path / "clear.avif")
    with pytest.raises(ClipError, match=r"picture of several parts .*save it as PNG"):
        scan(tmp_path / "clear.avif")
    picture.convert("RGB").save(tmp_path / "solid.avif")
    assert probe(tmp_path / "solid.avif").num_frames == 1


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


@pytest.mark.parametrize("name", ["copied.mkv", "turned.webm"])
def test_transparent_parts_of_copies_are_white(variant, tmp_path, name):
    alpha = "format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='255*lt(X,48)',format=yuva420p"
    vp9 = ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-deadline", "realtime", "-frames:v", "3")
    source, path = variant("-vf", alpha, *vp9, name="alpha.webm"), tmp_path / name
    ffmpeg(*("-display_rotation", "90") * (name == "turned.webm"), "-i", source, "-c", "copy", path)
    scanned = scan(path)
    (frame,), (upright,) = read_frames(path, [2], scanned), read_frames(source, [2], scan(source))
    assert (scanned.info.height, scanned.info.width) == frame.shape[:2]
    assert np.array_equal(frame, np.rot90(upright) if name == "turned.webm" else upright)
    assert upright[30:, 60:].min() >= 250


def test_transparent_colours_of_a_palette_are_white(tmp_path):
    picture = Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) // 128, "P")
    picture.putpalette([0, 255, 0, 200, 30, 60])
    picture.save(tmp_path / "a.png", transparency=0)
    ffmpeg("-i", tmp_path / "a.png", "-c", "copy", tmp_path / "a.mov")
    scanned = scan(tmp_path / "a.mov")
    (frame,) = read_frames(tmp_path / "a.mov", [0], scanned)
    assert np.array_equal(frame, decode.read_picture(tmp_path / "a.png"))
    assert {*map(tuple, frame.reshape(-1, 3).tolist())} == {(255, 255, 255), (200, 30, 60)}


@pytest.mark.parametrize("suffix", ["mov", "mkv"])
def test_exif_of_frames_turns_them_as_that_of_pictures(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    Image.fromarray(picture_frames(1)[0]).save(tmp_path / "a.jfif", "JPEG", exif=exif, quality=95)
    ffmpeg(
        "-stream_loop", "2", "-f", "mjpeg", "-i", tmp_path / "a.jfif", "-c", "copy", path := tmp_path / f"a.{suffix}"
    )
    (frame,) = read_frames(path, [0], scan(path))
    shown = decode.read_picture(tmp_path / "a.jfif")
    assert frame.shape == shown.shape == (96, 64, 3) and np.abs(frame.astype(int) - shown).mean() < 5


@pytest.mark.parametrize(
    ("name", "transfer", "hdr"), [("a.mp4", "smpte2084", 1), ("a.mkv", "arib-std-b67", 1), ("b.mp4", "bt709", 0)]
)
def test_hdr_is_found(variant, name, transfer, hdr):
    assert scan(
        variant("-c:v", "libx264", "-frames:v", "2", "-vf", f"setparams=color_trc={transfer}", name=name)
    ).hdr == bool(hdr)


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


def concatenated(path, *parts):
    path.with_suffix(".txt").write_text("".join(f"file '{part}'\n" for part in parts))
    ffmpeg("-f", "concat", "-safe", "0", "-i", path.with_suffix(".txt"), "-c", "copy", path)
    return path


@pytest.mark.parametrize(
    ("name", "ratio", "options"),
    [("a.ts", "4:3", ("-c:v", "libx264", "-bf", "2")), ("a.mpg", "32:27", ("-c:v", "mpeg2video", "-q:v", "2"))],
)
def test_pixels_that_change_their_shape_are_refused(variant, tmp_path, name, ratio, options):
    shapes = ("1/1", ratio.replace(":", "/"))
    first, second = (variant("-vf", f"setsar={shape}", *options, name=f"{shape[0]}{name}") for shape in shapes)
    path = concatenated(tmp_path / name, first, second)
    scanned = scan(path)
    assert read_frames(path, [0, 20], scanned).shape[1:] == (64, 96, 3)
    for read in (decode_all, lambda path, scanned: read_frames(path, [50], scanned)):
        with pytest.raises(ClipError, match=f"its pixels change from 1:1 to {ratio}, width to height; cut it there"):
            read(path, scanned)


def test_a_change_of_shape_is_found_by_decoding(variant, tmp_path):
    options = ("-c:v", "libx264", "-frames:v", "10")
    square = variant("-vf", "crop=64:64", *options, name="square.ts")
    path = concatenated(tmp_path / "shape.ts", variant(*options, name="wide.ts"), square)
    with pytest.raises(ClipError, match="its frames change from 64x96 to 64x64; cut it there"):
        decode_all(path, scan(path))


@pytest.mark.parametrize("wanted", [range(0, 60, 4), range(1, 60, 3)])
def test_frames_that_become_interlaced_are_those_of_a_whole_decoding(variant, tmp_path, wanted):
    moving = "geq=lum='128+100*sin((X+Y+6*N)/8)':cb=128:cr=128"
    x264 = ("-c:v", "libx264", "-preset", "fast", "-bf", "2", "-x264-params", "b-pyramid=none:weightp=0")
    parts = [
        variant("-vf", moving, *x264, name="progressive.ts"),
        variant("-vf", f"{moving},setfield=tff", *x264, "-flags", "+ildct+ilme", name="interlaced.ts"),
    ]
    scanned = scan(path := concatenated(tmp_path / "both.ts", *parts))
    whole = [*decode.each_frame(path, range(60), scanned, thread_type="AUTO")]
    assert np.array_equal(read_frames(path, wanted, scanned), np.stack([whole[index] for index in wanted]))
    found = [decode_all(clip, scan(clip)).interlaced for clip in (path, parts[0])]
    assert not scanned.interlaced and found == [True, False]


def test_interlaced_frames_may_change_their_size(variant, tmp_path):
    interlaced = ("-c:v", "libx264", "-flags", "+ildct+ilme", "-frames:v", "10")
    parts = [
        variant("-vf", f"{size}setfield=tff", *interlaced, name=f"{size[:5]}.ts") for size in ("", "scale=192:128,")
    ]
    scanned = scan(path := concatenated(tmp_path / "sizes.ts", *parts))
    assert scanned.interlaced and read_frames(path, range(20), scanned).shape == (20, 64, 96, 3)


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
        ("sound.mkv", "ends after 0.* of 1.0.* seconds"),
        ("sound.webm", "ends after 0.* of 1.0.* seconds"),
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
    elif name.startswith("sound"):
        codec = ("-c:v", "libvpx", "-cpu-used", "8", "-deadline", "realtime") if name.endswith("webm") else ()
        options = ("-g", "5", *codec, "-shortest")
        whole = variant(*options, name=f"whole_{name}", before=("-f", "lavfi", "-i", "sine=d=1"))
        assert probe(whole).num_frames == 30
        path.write_bytes(cut(whole, 0.6))
    with pytest.raises(ClipError, match=reason) as caught:
        scan(path)
    assert str(path) in str(caught.value)


def test_frames_that_a_clip_no_longer_has_are_named_and_the_others_read(clip):
    """As after it was replaced by another file."""
    scanned = scan(clip)
    ticks = scanned.ticks.copy()
    ticks[5] += 1
    ticks[29] += 1000
    other = scanned._replace(ticks=ticks)
    found = list(each_frame(clip, [4, 5, 6, 29], other))
    assert [isinstance(each, ClipError) for each in found] == [False, True, False, True]
    assert "its frame at 0.167 s cannot be decoded" in str(found[1]) and "at 0.967 s" in str(found[3])
    assert np.array_equal([found[0], found[2]], read_frames(clip, [4, 6], scanned))
    (alone,) = each_frame(clip, [5], other)
    assert str(alone) == str(found[1])
    assert read_frames(clip, [], scanned).shape == (0, 64, 96, 3), "none is wanted"


def test_a_picture_in_an_archive_that_cannot_be_read_is_a_bad_clip(tmp_path, monkeypatch):
    def opened(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(decode, "opened", opened)
    with pytest.raises(ClipError, match="a.png: cannot be read: Input/output error"):
        decode.read_picture("a.png")


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
    ("edits", "shown", "start", "gop"),
    [
        ([(1 / 3, None), (0.2, 3)], [3, 4, 5, 6, 7, 8], 10, 12),
        ([(0.3, 20), (0.1, 2)], [20, 21, 22, 23, 24, 25, 26, 27, 28, 2, 3, 4], 0, 12),
        ([(0.2, 2), (0.1, 45)], [2, 3, 4, 5, 6, 7, 15, 16, 17], 0, 60),  # decoded from a keyframe long before
    ],
)
def test_edit_lists_say_what_is_shown(variant, edits, shown, start, gop):
    """Edits are (seconds, first frame); None shows nothing, for a delay. FFmpeg may end an edit a frame late."""
    once_more = ("-stream_loop", "1")  # frames 30 to 59, so that times can go back by more than a second
    x264 = ("-c:v", "libx264", "-bf", "0", "-g", gop, "-sc_threshold", "0")
    path = variant(*x264, "-video_track_timescale", "3000", before=once_more)
    path.write_bytes(with_edits(path.read_bytes(), edits))
    scanned = scan(path)
    assert levels(path, range(len(scanned.times)), scanned)[: len(shown)] == shown
    assert scanned.times[0] == pytest.approx(start / 30, abs=0.01) and len(scanned.times) <= len(shown) + 1


@pytest.mark.parametrize(
    ("edits", "rates", "fault"),
    [
        ([(0.5, 0)], [2], "plays a part at 2 times its speed"),
        ([(0.3, 0), (0.4, 9), (0.3, 10)], [1, 0, 1], "plays a part at 0 times its speed"),
        ([(0.3, 0), (0.2, None), (0.3, 9)], [1, 1, 1], "shows nothing after its first part"),
        ([(1, 0)], [0], None),
        ([(0.2, None), (0.8, 0)], [0, 1], None),
    ],
)
def test_edits_that_ffmpeg_does_not_follow_are_refused(variant, edits, rates, fault):
    path = variant("-c", "copy", "-video_track_timescale", "3000")
    path.write_bytes(with_edits(path.read_bytes(), edits, rates))
    if fault is None:
        assert scan(path).info.num_frames >= 24
        return
    with pytest.raises(ClipError, match=f"has an edit list that {fault}, which FFmpeg does not follow"):
        scan(path)
