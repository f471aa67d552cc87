"""Read metadata and decode frames of clips with PyAV. A picture file is a clip of one frame.

A frame is known by its presentation time: `scan` reads the times of all frames from the packets, and `read_frames`
decodes from the start and keeps the frames whose times were asked for. Nothing is sought, so that the structure of the
stream (open GOPs, intra refresh, edit lists) cannot shift a frame. Frames come as players show them: turned upright,
mirrored where the clip says so, with square pixels, deinterlaced, transparent parts over white.

Legend: T frames, N frames of a clip, H W pixels of an upright frame.
"""

import errno
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import av
import av.container
import av.error
import numpy as np
from av.filter import Graph
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from sgm.data.clips import pictures
from sgm.data.rows import ClipFile, VideoInfo, is_picture, opened, require_file
from sgm.log import get_logger
from sgm.util import RunError

logger = get_logger(__name__)

READER = 5  # increment when the metadata or the frames of a clip change: caches and indices of others are not used
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192, above 8K
_COMPLETE = 0.9  # share of the stated duration that the packets must fill; trimming and rounding cost a little
_BACK = 1.0  # seconds by which decoding times may go back; those of joined files begin again
_TURNED = 0.02  # of the smaller to the larger entries of a display matrix: a degree besides quarters of a turn
_SAME_SHAPE = 0.02  # of |log(aspect ratio)| of the frames of a clip, whose size may change
_WITHOUT_TIMES = ("avi", "h264", "hevc", "m4v")  # container formats whose presentation times FFmpeg invents
_SELECTIVE = ("h264", "hevc")  # decoders that leave out single frames that no other frame refers to
_FIELDS_IN_PACKETS = ("h264",)  # decoders that join them; parsers join those of other codecs
_FIELDS_AS_FRAMES = ("hevc",)  # decoders that call nothing else interlaced
_DEINTERLACE = "deinterlace it first: ffmpeg -i IN -vf"
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_STATED = {"max_pixels": str(MAX_PIXELS)}  # FFmpeg's name; refuses larger frames before it allocates them


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


class Scan(NamedTuple):
    """The metadata of a clip, and the times of its frames."""

    info: VideoInfo
    times: np.ndarray  # (N,) float64: presentation times in seconds, ascending
    ticks: np.ndarray  # (N,) int64: the same in the stream's time base
    stored: tuple[int, int] = (0, 0)  # (H, W) of the first frame as it is decoded
    ordered: bool = False  # the container states no presentation times: frame n is the n-th that is decoded
    interlaced: bool = False


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
    first, count, decoded, latest = None, 0, set[int | None](), -math.inf
    by_fields = False
    with open_video(path) as (container, stream):
        ordered |= container.format.name in _WITHOUT_TIMES and stream.codec_context.reorder_depth > 0
        decoder = _decoder(stream)
        for packet in _packets(container, stream):
            if packet.dts is not None and packet.dts < latest - _BACK / float(stream.time_base or 1):
                said = f"its times begin again after {len(packets)} frames, as where files were joined"
                raise ClipError(path, f"{said}; cut it there, or encode it again")
            latest = max(latest, packet.dts if packet.dts is not None else latest)
            if packet.is_corrupt:
                raise ClipError(path, f"is cut off or damaged after {len(packets)} frames; copy or encode it again")
            if packet.size and not packet.is_discard:  # discarded: trimmed without encoding again
                packets.append((packet.pts, packet.dts, packet.duration or 0))
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
        height, width = _shown_size(path, stream, first)
    if any(pts is None for pts, _, _ in packets) and (ordered or all(pts is None for pts, _, _ in packets)):
        if not ordered:
            return _scan_video(path, ordered=True)
        packets = [(dts, dts, length) for _, dts, length in packets]
    if first.interlaced_frame and decoder.name in _FIELDS_AS_FRAMES:
        raise ClipError(path, f"holds each field as a frame (interlaced); {_DEINTERLACE} weave,bwdif OUT.mp4")
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
    if max(duration, end) < _COMPLETE * stated:  # some containers count from 0, not from the first frame
        raise ClipError(path, f"ends after {duration:.2f} of {stated:.2f} seconds; copy or encode it again")
    fps = (len(times) - 1) / span if (span := float(times[-1] - times[0])) > 0 else 0.0
    info, stored = VideoInfo(len(times), fps, duration, height, width), (first.height, first.width)
    return Scan(info, times, ticks, stored, ordered, first.interlaced_frame)


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
    upright = _Upright(path, scanned.stored, size or (scanned.info.height, scanned.info.width), interpolation)

    def missing(place: int) -> ClipError:
        return ClipError(path, f"its frame at {scanned.times[indices[place]]:.3f} s cannot be decoded; encode it again")

    for tick, frame, is_whole in _timed_frames(path, scanned, {*wanted}, thread_type):
        while wanted[position] < tick:
            yield missing(position)
            position += 1
            if position == len(wanted):
                return
        picture = None
        while wanted[position] == tick:
            if picture is None:
                picture = upright(frame) if is_whole else missing(position)
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


def decode_all(path: str | ClipFile, scanned: Scan) -> None:
    """Decode a whole clip to find damage; discard the frames.

    Raises:
        ClipError: a frame is missing or damaged.
    """
    if is_picture(path):
        read_picture(path)
        return
    found = {tick for tick, _, is_whole in _timed_frames(path, scanned, None, None) if is_whole}
    if lost := [index for index, tick in enumerate(scanned.ticks.tolist()) if tick not in found]:
        said = f"{len(lost)} of its {len(scanned.ticks)} frames, the first at {scanned.times[lost[0]]:.3f} s,"
        raise ClipError(path, f"{said} cannot be decoded; copy or encode it again")


@contextmanager
def open_video(
    path: str | ClipFile, *, thread_type: str | None = None
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a clip in PyAV; errors of FFmpeg inside the block become a ClipError.

    Args:
        path: the clip.
        thread_type: ``AUTO`` decodes on all cores; None on one, as for clips that are decoded in parallel.
    """
    try:
        require_file(path)
        with av.open(opened(path), mode="r", options=_STATED) as container:
            stream = _video_stream(path, container)
            if stream.width * stream.height > MAX_PIXELS:
                raise _too_large(path, stream.height, stream.width)
            stream.codec_context.options = _STATED
            if thread_type is None:
                stream.codec_context.thread_count = 1
            else:
                stream.thread_type = thread_type
            yield container, stream
    except RunError:  # also of a clip afar that cannot be had now, which is no fault of the clip
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ClipError(path, _reason(error)) from error


def _video_stream(path: str | ClipFile, container: av.container.InputContainer) -> av.VideoStream:
    """Return the video that players show, not a cover picture."""
    videos = [video for video in container.streams.video if not video.disposition & Disposition.attached_pic]
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


def _stated_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Return the seconds of video that the header states, or 0."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:  # else it may be that of the audio
        return container.duration / av.time_base
    return 0.0


def _shown_size(path: str | ClipFile, stream: av.VideoStream, frame: av.VideoFrame) -> tuple[int, int]:
    """Return (H, W) of an upright frame with square pixels; as players, the width follows the ratio of pixels."""
    height, width = frame.height, max(round(frame.width * (stream.sample_aspect_ratio or 1)), 1)
    if height * width > MAX_PIXELS:
        raise _too_large(path, height, width)
    return (width, height) if _orientation(path, frame).transposed else (height, width)


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


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yield the packets of a stream and the last one, which is empty; an empty one before it would end decoding."""
    return (packet for packet in container.demux(stream) if packet.size or packet.dts is None)


def _decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """Return the decoder of a stream; for WebM with alpha that of libvpx, since FFmpeg's own one leaves out alpha."""
    name = _ALPHA_DECODERS.get(stream.codec_context.name)
    if name is None or stream.metadata.get("alpha_mode") != "1" or name not in av.codecs_available:
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


def _timed_frames(
    path: str | ClipFile, scanned: Scan, wanted: Collection[int] | None, thread_type: str | None
) -> Iterator[tuple[int, av.VideoFrame, bool]]:
    """Decode from the start: yield the presentation time of each frame in ticks, the frame, and whether it is whole.

    After a damaged packet, frames are whole again from the next keyframe on. With `wanted` ticks and one thread, frames
    that no other frame refers to may be left out if their ticks are not among them.
    """
    damaged: set[int] = set()
    with open_video(path, thread_type=thread_type) as (container, stream):
        selective = thread_type is None and stream.codec_context.name in _SELECTIVE
        selective &= not (scanned.ordered or scanned.interlaced)
        frames = _marked_frames(path, container, stream, scanned, wanted if selective else None, damaged)
        for frame in _deinterlaced(frames, stream):
            tick = round((frame.pts or 0) * (frame.time_base or 1) / (stream.time_base or 1))
            yield tick, frame, tick not in damaged


def _marked_frames(
    path: str | ClipFile,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    scanned: Scan,
    wanted: Collection[int] | None,
    damaged: set[int],
) -> Iterator[av.VideoFrame]:
    """Yield decoded frames whose ``pts`` are their ticks in `scanned`; add those of frames with damage to `damaged`."""
    is_whole, count, last, ticks = True, 0, -math.inf, scanned.ticks.tolist()
    decoder = _decoder(stream)
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
            last, is_whole = frame.pts, is_whole or frame.key_frame
            if frame.is_corrupt or not is_whole:
                damaged.add(frame.pts)
            yield frame


def _deinterlaced(frames: Iterator[av.VideoFrame], stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yield frames, from the first interlaced one on through FFmpeg's bwdif, which changes interlaced frames alone."""
    graph = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is None:
            graph = Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base
            )
            last = graph.add("buffersink")
            graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), last).configure()
        graph.vpush(frame)
        yield from _pulled(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _pulled(graph)


def _pulled(graph: Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


class _Upright:
    """Turns decoded frames into pictures as they are shown.

    Args:
        path: the clip.
        stored: (H, W) of its first frame as it is decoded.
        size: (H, W) of the pictures.
        interpolation: of scaling, by its name in PyAV.
    """

    def __init__(
        self, path: str | ClipFile, stored: tuple[int, int], size: tuple[int, int], interpolation: str
    ) -> None:
        self._path, self._stored, self._size, self._interpolation = path, stored, size, interpolation
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray | ClipError:
        """Return a frame (H, W, 3) uint8, RGB; an error if it has another shape than the first one."""
        (was_h, was_w), (now_h, now_w) = self._stored, (frame.height, frame.width)
        if abs(math.log(was_h * now_w / (was_w * now_h))) > _SAME_SHAPE:
            return ClipError(self._path, f"its frames change from {was_h}x{was_w} to {now_h}x{now_w}; cut it there")
        orientation = _orientation(self._path, frame)
        height, width = reversed(self._size) if orientation.transposed else self._size
        has_alpha = any(component.is_alpha for component in frame.format.components)
        picture = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgba" if has_alpha else "rgb24",
            interpolation="BILINEAR" if (now_h, now_w) == (height, width) else self._interpolation,
            threads=1,
        ).to_ndarray()
        if has_alpha:
            picture = pictures.over_background(picture)
        return orientation(picture)
