"""Read metadata and decode frames of clips with PyAV. A picture file is a clip of one frame.

A frame is known by its presentation time: `scan` reads the times of all frames from the packets, and `read_frames`
decodes from the start and keeps the frames whose times were asked for. Nothing is sought, so that the structure of the
stream (open GOPs, intra refresh, edit lists) cannot shift a frame. Frames come as players show them: turned upright,
mirrored and cropped where the clip says so, with square pixels, deinterlaced, transparent parts over white.

Legend: T frames, N frames of a clip, H W pixels of an upright frame.
"""

import errno
import io
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple

import av
import av.container
import av.error
import numpy as np
from av.sidedata import sidedata
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from sgm.data.clips import pictures
from sgm.data.clips.containers import Crop, Header, read_header
from sgm.data.clips.deinterlace import deinterlaced
from sgm.data.rows import ClipFile, VideoInfo, is_picture, opened, require_file
from sgm.log import get_logger
from sgm.util import RunError

logger = get_logger(__name__)

READER = 6  # increment when the metadata or the frames of a clip change: caches and indices of others are not used
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192, above 8K
_COMPLETE = 0.9  # share of the stated duration that the packets must fill; trimming and rounding cost a little
_BACK = 1.0  # seconds by which decoding times may go back; those of joined files begin again
_TURNED = 0.02  # of the smaller to the larger entries of a display matrix: a degree besides quarters of a turn
_SAME_SHAPE = 0.02  # of |log(aspect ratio)| of the frames of a clip, whose size may change, and of their pixels
_WITHOUT_TIMES = ("avi", "h264", "hevc", "m4v")  # container formats whose presentation times FFmpeg invents
_SELECTIVE = ("h264", "hevc")  # decoders that leave out single frames that no other frame refers to
_FIELDS_IN_PACKETS = ("h264",)  # decoders that join them; parsers join those of other codecs
_FIELDS_AS_FRAMES = ("hevc",)  # decoders that call nothing else interlaced
_DEINTERLACE = "deinterlace it first: ffmpeg -i IN -vf"
_AS_FRAMES = f"holds each field as a frame (interlaced); {_DEINTERLACE} weave,bwdif OUT.mp4"
_PALETTE = "pal8"  # the pixel format whose colours may be transparent although it has one component
_HDR = (16, 18)  # transfer functions PQ and HLG, by FFmpeg's numbers
_STILLS = ("avif", "heic", "heix", "heim", "heis", "mif1", "mif2")  # brands: FFmpeg gives each tile as a video
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_STATED = {"max_pixels": str(MAX_PIXELS)}  # FFmpeg's name; refuses larger frames before it allocates them


def _unknown_kind(cls: type[sidedata.Type], value: int) -> sidedata.Type:
    kind = object.__new__(cls)
    kind._name_, kind._value_ = f"KIND_{value}", value
    return kind


# PyAV gives no side data of a frame if one has a kind that is newer than its list, as EXIF in JPEG.
setattr(sidedata.Type, "_missing_", classmethod(_unknown_kind))  # noqa: B010


class ClipError(RunError):
    """A clip is unusable; training replaces it by another one.

    Attributes:
        path: the clip.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | ClipFile, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(f"clip {path}: {reason}")

    def __reduce__(self) -> tuple[type["ClipError"], tuple[str, str]]:
        """Pickle with the constructor's arguments; the default passes only the message."""
        return ClipError, (self.path, self.reason)


_Faults = dict[int, ClipError | None]  # tick of a frame that cannot be used → why; None where it is damaged


class Scan(NamedTuple):
    """The metadata of a clip, and the times of its frames."""

    info: VideoInfo
    times: np.ndarray  # (N,) float64: presentation times in seconds, ascending
    ticks: np.ndarray  # (N,) int64: the same in the stream's time base
    stored: tuple[int, int] = (0, 0)  # (H, W) of the first frame as it is decoded
    ordered: bool = False  # the container states no presentation times: frame n is the n-th that is decoded
    interlaced: bool = False  # the first frame is; of `decode_all`, any
    hdr: bool = False  # brightness is that of PQ or HLG
    crop: Crop = Crop()  # pixels of stored frames that are not shown
    orientation: "_Orientation | None" = None  # of all frames, where the decoder says nothing of it


def probe(path: str | ClipFile) -> VideoInfo:
    """Return the metadata of a clip; see `scan`."""
    return scan(path).info


def scan(path: str | ClipFile) -> Scan:
    """Read the packets of a clip; decode the first frame for the size and to check for a decoder.

    Frames that the container hides (edit lists), or that cannot be decoded because the clip was cut before them
    without encoding again, are not counted. Two kinds of clips are decoded as a whole: without presentation times and
    with reordered frames (B-frames in avi), to count them; and interlaced H.264, of which a packet may hold one of the
    two fields of a frame.

    Raises:
        ClipError: it cannot be read, holds no frames, or is shorter than its header states.
    """
    if is_picture(path):
        height, width = read_picture(path).shape[:2]
        return Scan(VideoInfo(1, 0.0, 0.0, height, width), np.zeros(1), np.zeros(1, np.int64))
    return _scan_video(path, ordered=False)


def _scan_video(path: str | ClipFile, *, ordered: bool) -> Scan:
    packets: list[tuple[int | None, int | None, int]] = []
    first, own, count, decoded, latest, by_fields, ends = None, None, 0, set[int | None](), -math.inf, False, [0.0]
    with open_video(path) as (container, stream, source):
        header = _header(path, source, container, stream)
        ordered |= container.format.name in _WITHOUT_TIMES and stream.codec_context.reorder_depth > 0
        decoder, back = _decoder(stream), math.inf if header.is_edited else _BACK
        for packet in _packets(container, stream, ends):
            if packet.dts is not None and packet.dts < latest - back / float(stream.time_base or 1):
                said = f"its times begin again after {len(packets)} frames, as where files were joined"
                raise ClipError(path, f"{said}; cut it there, or encode it again")
            latest = max(latest, packet.dts if packet.dts is not None else latest)
            if packet.is_corrupt:
                raise ClipError(path, f"is cut off or damaged after {len(packets)} frames; copy or encode it again")
            if packet.size and not packet.is_discard:  # discarded: trimmed without encoding again
                packets.append((packet.pts, packet.dts, packet.duration or 0))
            if own is None and decoder is not stream.codec_context:
                own = next(iter(_decode(stream.codec_context, packet) or ()), None)
            if first is None or ordered or by_fields:
                found = _decode(decoder, packet)
                if found is None and by_fields:  # what is no frame could be a lost one, or a second field
                    raise ClipError(path, f"is interlaced, and damaged after {len(packets)} fields; encode it again")
                frames = [frame for frame in found or () if not frame.is_corrupt]
                first, count = first or next(iter(frames), None), count + len(frames)
                decoded.update(frame.pts for frame in found or ())
                by_fields = first is not None and first.interlaced_frame and decoder.name in _FIELDS_IN_PACKETS
        if first is None or not packets:
            raise ClipError(path, "holds no frames that can be decoded")
        base, stated = float(stream.time_base or 1), _stated_duration(container, stream)
        crop = header.crop if min(header.crop.shape(first.height, first.width)) > 0 else Crop()
        orientation = own and _orientation(path, own)
        height, width = _shown_size(path, stream, first, crop, orientation or _orientation(path, first))
        hdr = stream.codec_context.color_trc in _HDR
    if any(pts is None for pts, _, _ in packets) and (ordered or all(pts is None for pts, _, _ in packets)):
        if not ordered:
            return _scan_video(path, ordered=True)
        packets = [(dts, dts, length) for _, dts, length in packets]
    if first.interlaced_frame and decoder.name in _FIELDS_AS_FRAMES:
        raise ClipError(path, _AS_FRAMES)
    if ordered and by_fields and count < len(packets):
        raise ClipError(path, f"holds fields (interlaced) without presentation times; {_DEINTERLACE} bwdif OUT.mp4")
    if ordered and count != len(packets):
        raise ClipError(path, f"only {count} of its {len(packets)} frames can be decoded; encode it again as mp4")
    shown = [(pts, length) for pts, _, length in packets if pts is not None and (ordered or pts >= (first.pts or 0))]
    if by_fields and not ordered:
        shown = [(pts, length) for pts, length in shown if pts in decoded]
    ticks = np.array([pts for pts, _ in shown], dtype=np.int64)
    ticks = np.sort(ticks) if ordered else np.unique(ticks)  # VP8 hides frames under the time of another
    timed = None not in decoded if by_fields else all(pts is not None for pts, _, _ in packets)
    if len(ticks) == 0 or len(ticks) < len(shown) / 2 or not (ordered or timed):
        said = f"states {len(ticks)} presentation times for its {len(packets)} frames"
        raise ClipError(path, f"{said}; encode it again, as mp4")
    times = ticks * base
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    end = max(max(pts + length for pts, length in shown) * base, float(times[-1]) + gap)
    duration = end - float(times[0])
    if max(duration, end, *ends) < _COMPLETE * stated:  # some containers count from 0, not from the first frame
        raise ClipError(path, f"ends after {duration:.2f} of {stated:.2f} seconds; copy or encode it again")
    fps = (len(times) - 1) / span if (span := float(times[-1] - times[0])) > 0 else 0.0
    info, stored = VideoInfo(len(times), fps, duration, height, width), (first.height, first.width)
    return Scan(info, times, ticks, stored, ordered, first.interlaced_frame, hdr, crop, orientation)


def read_frames(path: str | ClipFile, indices: Sequence[int], scanned: Scan) -> np.ndarray:
    """Decode some frames of a clip.

    Args:
        path: the clip.
        indices: of the frames in display order, ascending.
        scanned: the result of `scan`.

    Returns:
        (T, H, W, 3) uint8, RGB.

    Raises:
        ClipError: a frame with one of these presentation times cannot be decoded.
    """
    if is_picture(path):
        return read_picture(path)[None]
    pictures = np.empty((len(indices), scanned.info.height, scanned.info.width, 3), np.uint8)
    for place, picture in enumerate(each_frame(path, indices, scanned)):
        if isinstance(picture, ClipError):
            raise picture
        pictures[place] = picture
    return pictures


def each_frame(
    path: str | ClipFile,
    indices: Sequence[int],
    scanned: Scan,
    *,
    size: tuple[int, int] | None = None,
    interpolation: str = "BICUBIC",
    thread_type: str | None = None,
) -> Iterator[np.ndarray | ClipError]:
    """Yield frames one by one, or for each that cannot be decoded the reason; see `read_frames` and `open_video`.

    Args:
        path: the clip.
        indices: of the frames in display order, ascending; a repeated one is yielded again.
        scanned: the result of `scan`.
        size: (H, W) to which frames are scaled; None is that of the clip.
        interpolation: of scaling, by its name in PyAV.
        thread_type: see `open_video`.
    """
    wanted, position = scanned.ticks[list(indices)].tolist(), 0
    if not wanted:
        return
    upright = _Upright(path, scanned, size or (scanned.info.height, scanned.info.width), interpolation)

    def missing(place: int) -> ClipError:
        return ClipError(path, f"its frame at {scanned.times[indices[place]]:.3f} s cannot be decoded; encode it again")

    faults: _Faults = {}
    for tick, frame in _timed_frames(path, scanned, {*wanted}, thread_type, faults):
        while wanted[position] < tick:
            yield missing(position)
            position += 1
            if position == len(wanted):
                return
        picture = None
        while wanted[position] == tick:
            if picture is None:
                picture = upright(frame) if tick not in faults else faults[tick] or missing(position)
            yield picture
            position += 1
            if position == len(wanted):
                return
    yield from (missing(place) for place in range(position, len(wanted)))


def read_picture(path: str | ClipFile) -> np.ndarray:
    """Decode a picture file: (H, W, 3) uint8, RGB; see `sgm.data.clips.pictures`.

    Raises:
        ClipError: it cannot be decoded.
    """
    try:
        return pictures.read_picture(opened(path))
    except pictures.PictureError as error:
        kind = "is not a picture, or a damaged one" if error.damaged else "cannot be used"
        raise ClipError(path, f"{kind}: {error}") from error
    except OSError as error:  # of an archive
        raise ClipError(path, f"cannot be read: {error.strerror or error}") from error


def decode_all(path: str | ClipFile, scanned: Scan) -> Scan:
    """Decode a whole clip to find damage; discard the frames.

    Returns:
        `scanned`, interlaced if any frame is.

    Raises:
        ClipError: a frame is missing or damaged, or has another shape than the first one.
    """
    if is_picture(path):
        read_picture(path)
        return scanned
    found, is_interlaced = set[int](), scanned.interlaced
    faults: _Faults = {}
    with open_video(path) as (container, stream, _):
        for frame in _marked_frames(path, container, stream, scanned, None, faults):
            found.add(frame.pts or 0)
            is_interlaced |= frame.interlaced_frame
    if changed := next((fault for fault in faults.values() if fault is not None), None):
        raise changed
    whole = found - faults.keys()
    if lost := [index for index, tick in enumerate(scanned.ticks.tolist()) if tick not in whole]:
        said = f"{len(lost)} of its {len(scanned.ticks)} frames, the first at {scanned.times[lost[0]]:.3f} s,"
        raise ClipError(path, f"{said} cannot be decoded; copy or encode it again")
    return scanned._replace(interlaced=is_interlaced)


@contextmanager
def open_video(
    path: str | ClipFile, *, thread_type: str | None = None
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream, str | io.BytesIO]]:
    """Open a clip in PyAV; errors of FFmpeg inside the block become a ClipError.

    Args:
        path: the clip.
        thread_type: ``AUTO`` decodes on all cores; None on one, as for clips that are decoded in parallel.

    Yields:
        The container, its video, and what was opened: the path, or the bytes of an embedded clip.
    """
    try:
        require_file(path)
        source = opened(path)
        with av.open(source, mode="r", options=_STATED) as container:
            stream = _video_stream(path, container)
            if stream.width * stream.height > MAX_PIXELS:
                raise _too_large(path, stream.height, stream.width)
            stream.codec_context.options = _STATED
            if thread_type is None:
                stream.codec_context.thread_count = 1
            else:
                stream.thread_type = thread_type
            yield container, stream, source
    except RunError:  # also of a clip afar that cannot be had now, which is no fault of the clip
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ClipError(path, _reason(error)) from error


def _videos(container: av.container.InputContainer) -> list[av.VideoStream]:
    """Return the videos of a clip without cover pictures."""
    return [video for video in container.streams.video if not video.disposition & Disposition.attached_pic]


def _video_stream(path: str | ClipFile, container: av.container.InputContainer) -> av.VideoStream:
    """Return the video that players show, not a cover picture."""
    videos = _videos(container)
    if len(videos) > 1 and container.metadata.get("major_brand") in _STILLS:
        raise ClipError(
            path, "is a HEIF or AVIF picture of several parts (tiles, transparency); save it as PNG or JPEG"
        )
    if not videos:
        cover = ", only a cover picture" if container.streams.video else ""
        raise ClipError(path, f"holds no video{cover}")
    best = container.streams.best("video")
    stream = next((video for video in videos if best is not None and video.index == best.index), videos[0])
    if stream.codec_context is None:
        raise ClipError(path, "holds video of a codec that this build of PyAV cannot decode; encode it as H.264")
    return stream


def _too_large(path: str | ClipFile, height: int, width: int) -> ClipError:
    return ClipError(path, f"has frames of {height}x{width}, above {MAX_PIXELS:,} pixels; scale it down")


def _reason(error: Exception) -> str:
    # Lists of other files are refused as EPERM, frames of impossible sizes as EBUSY; a missing right is EACCES.
    # A damaged file may state sizes for which there is no memory.
    odd = isinstance(error, av.error.FFmpegError) and error.errno in (errno.EPERM, errno.EBUSY, errno.ENOMEM)
    if odd or isinstance(error, av.error.InvalidDataError | av.error.EOFError):
        return "is not a video, or a damaged one; copy or encode it again"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _header(
    path: str | ClipFile, source: str | io.BytesIO, container: av.container.InputContainer, stream: av.VideoStream
) -> Header:
    place = [video.index for video in _videos(container)].index(stream.index)
    header = read_header(source, container.format.name, track=stream.id, place=place)
    if header.fault is not None:
        raise ClipError(path, header.fault)
    return header


def _stated_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Return the seconds of video, or of the longest stream of the file, that the header states, or 0."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def _shown_size(
    path: str | ClipFile, stream: av.VideoStream, frame: av.VideoFrame, crop: Crop, orientation: "_Orientation"
) -> tuple[int, int]:
    """Return (H, W) of an upright frame with square pixels; as players, the width follows the ratio of pixels."""
    height, width = crop.shape(frame.height, frame.width)
    width = max(round(width * (stream.sample_aspect_ratio or 1)), 1)
    if height * width > MAX_PIXELS:
        raise _too_large(path, height, width)
    return (width, height) if orientation.transposed else (height, width)


class _Orientation(NamedTuple):
    """How a picture is laid out to be shown: rows and columns exchanged, then the one or the other reversed."""

    transposed: bool = False
    upwards: bool = False
    leftwards: bool = False

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        picture = picture.swapaxes(0, 1) if self.transposed else picture
        return picture[:: -1 if self.upwards else 1, :: -1 if self.leftwards else 1]


def _orientation(path: str | ClipFile, frame: av.VideoFrame) -> _Orientation:
    """Return how a frame is laid out: turned by quarters, mirrored or both, as its display matrix says.

    The matrix has the place of a pixel: x to the right and y down become m00 x + m10 y and m01 x + m11 y (ISO/IEC
    14496-12, 8.3.2). `frame.rotation` says nothing of mirrored pictures.
    """
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return _Orientation()
    matrix = np.frombuffer(bytes(stored), np.int32).reshape(3, 3)[:2, :2]
    transposed = abs(matrix[0, 1]) > abs(matrix[0, 0])
    (right, down), others = (matrix[::-1] if transposed else matrix).diagonal(), np.abs(matrix).min(1)
    if max(others) > _TURNED * min(abs(right), abs(down)):
        turn = round(math.degrees(math.atan2(-matrix[0, 1], matrix[0, 0])))
        raise ClipError(path, f"is shown turned by {turn} degrees; encode it again, which turns the frames")
    return _Orientation(bool(transposed), bool(down < 0), bool(right < 0))


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream, ends: list[float] | None = None
) -> Iterator[av.Packet]:
    """Yield the packets of a stream and the last one, which is empty; an empty one before it would end decoding.

    Where only the length of the file is stated, which may be that of its sound, the seconds at which packets of other
    streams end are added to `ends`, if given.
    """
    all_streams = ends is not None and stream.duration is None
    for packet in container.demux() if all_streams else container.demux(stream):
        if packet.stream.index != stream.index:
            if ends is not None and packet.pts is not None:
                ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
        elif packet.size or packet.dts is None:
            yield packet


def _decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """Return the decoder of a stream; for WebM with alpha that of libvpx, since FFmpeg's own one leaves out alpha."""
    name = _ALPHA_DECODERS.get(stream.codec_context.name)
    has_alpha = any(key.lower() == "alpha_mode" and value == "1" for key, value in stream.metadata.items())
    if name is None or not has_alpha or name not in av.codecs_available:
        return stream.codec_context
    decoder = av.CodecContext.create(name, "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.thread_count, decoder.options = stream.codec_context.thread_count, _STATED
    return decoder


def _decode(decoder: av.VideoCodecContext, packet: av.Packet) -> list[av.VideoFrame] | None:
    """Return the frames that a packet completes, or None if it is damaged."""
    try:
        return decoder.decode(packet)
    except av.error.InvalidDataError as error:
        logger.debug("a packet cannot be decoded: %s", error)
        return None


class _InterlacedError(Exception):
    """A frame is interlaced, and those beside it, which deinterlacing needs, may have been left out."""


def _timed_frames(
    path: str | ClipFile, scanned: Scan, wanted: Collection[int], thread_type: str | None, faults: _Faults
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode from the start: yield the presentation time of each frame in ticks and the frame; add to `faults`.

    With one thread, frames that no other frame refers to may be left out if their ticks are not among the `wanted`
    ones. If interlaced frames come, all frames are decoded, from the start again.
    """
    may_skip = thread_type is None and not (scanned.ordered or scanned.interlaced)
    try:
        yield from _each_timed(path, scanned, wanted if may_skip else None, thread_type, faults)
    except _InterlacedError:
        faults.clear()
        yield from _each_timed(path, scanned, None, thread_type, faults)


def _each_timed(
    path: str | ClipFile, scanned: Scan, wanted: Collection[int] | None, thread_type: str | None, faults: _Faults
) -> Iterator[tuple[int, av.VideoFrame]]:
    with open_video(path, thread_type=thread_type) as (container, stream, _):
        selected = wanted if stream.codec_context.name in _SELECTIVE else None
        frames = _marked_frames(path, container, stream, scanned, selected, faults)
        for frame in deinterlaced(frames, stream.time_base):
            yield round((frame.pts or 0) * (frame.time_base or 1) / (stream.time_base or 1)), frame


def _marked_frames(
    path: str | ClipFile,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    scanned: Scan,
    wanted: Collection[int] | None,
    faults: _Faults,
) -> Iterator[av.VideoFrame]:
    """Yield decoded frames whose ``pts`` are their ticks in `scanned`; add those that cannot be used to `faults`.

    After a damaged packet, frames are whole again from the next keyframe on.

    Raises:
        _InterlacedError: a frame is interlaced, and only `wanted` ones are decoded for certain.
    """
    is_whole, count, last, ticks = True, 0, -math.inf, scanned.ticks.tolist()
    decoder, ratio = _decoder(stream), None
    for packet in _packets(container, stream):
        if wanted is not None:
            needed = packet.size == 0 or packet.pts in wanted
            decoder.skip_frame = "DEFAULT" if needed else "NONREF"
        frames = _decode(decoder, packet)
        is_whole = is_whole and frames is not None
        for frame in frames or ():
            if scanned.ordered:
                frame.pts = ticks[min(count, len(ticks) - 1)]
                frame.time_base = stream.time_base
                count += 1
            if frame.pts is None:  # before the start of the clip
                continue
            if frame.pts < last:
                raise ClipError(path, "its frames are not in the order of their times; encode it again as mp4")
            if frame.interlaced_frame and decoder.name in _FIELDS_AS_FRAMES:
                raise ClipError(path, _AS_FRAMES)
            if frame.interlaced_frame and wanted is not None:
                raise _InterlacedError
            last, is_whole = frame.pts, is_whole or frame.key_frame
            now = decoder.sample_aspect_ratio or 1
            ratio = ratio or now
            if changed := _change(scanned, frame, ratio, now):
                faults[frame.pts] = ClipError(path, f"its {changed}; cut it there")
            if frame.is_corrupt or not is_whole:
                faults[frame.pts] = None
            yield frame


def _change(scanned: Scan, frame: av.VideoFrame, was: Fraction | int, now: Fraction | int) -> str | None:
    """Return how the shape of a frame differs from that of the first; `was` and `now` are their ratios of pixels."""
    (was_h, was_w), (now_h, now_w) = scanned.stored, (frame.height, frame.width)
    is_cropped = any(scanned.crop) and scanned.stored != (now_h, now_w)
    if is_cropped or abs(math.log(was_h * now_w / (was_w * now_h))) > _SAME_SHAPE:
        return f"frames change from {was_h}x{was_w} to {now_h}x{now_w}"
    if was != now and abs(math.log(was / now)) > _SAME_SHAPE:
        return f"pixels change from {_ratio(was)} to {_ratio(now)}, width to height"
    return None


def _ratio(value: Fraction | int) -> str:
    return "{}:{}".format(*value.as_integer_ratio())


class _Upright:
    """Turns decoded frames into pictures as they are shown.

    Args:
        path: the clip.
        scanned: the result of `scan`.
        size: (H, W) of the pictures.
        interpolation: of scaling, by its name in PyAV.
    """

    def __init__(self, path: str | ClipFile, scanned: Scan, size: tuple[int, int], interpolation: str) -> None:
        self._path, self._scanned, self._size, self._interpolation = path, scanned, size, interpolation
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Return a frame (H, W, 3) uint8, RGB."""
        orientation = self._scanned.orientation or _orientation(self._path, frame)
        height, width = reversed(self._size) if orientation.transposed else self._size
        has_alpha = frame.format.name == _PALETTE or any(component.is_alpha for component in frame.format.components)
        form = "rgba" if has_alpha else "rgb24"
        if any(self._scanned.crop):
            whole = self._scaled(frame, frame.height, frame.width, form).to_ndarray()
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(self._scanned.crop(whole)), format=form)
        picture = self._scaled(frame, height, width, form).to_ndarray()
        if has_alpha:
            picture = pictures.over_background(picture)
        return orientation(picture)

    def _scaled(self, frame: av.VideoFrame, height: int, width: int, form: str) -> av.VideoFrame:
        return self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format=form,
            interpolation="BILINEAR" if (frame.height, frame.width) == (height, width) else self._interpolation,
            threads=1,
        )
