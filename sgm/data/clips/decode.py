"""Read metadata and decode frames of clips. A picture file is a clip of one frame.

Times and counts come from PyAV, which reads packets without decoding them. Frames come from decord, or from PyAV if
decord is missing, fails or has another frame count. Both apply the rotation and give equal pixels.

Legend: T frames, H W pixels of an upright frame.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import av
import av.container
import av.error
import numpy as np

from sgm.data.clips import pictures
from sgm.data.rows import ClipFile, VideoInfo, is_picture, opened
from sgm.log import get_logger
from sgm.util import RunError

logger = get_logger(__name__)

_COMPLETE = 0.9  # share of the stated duration that the packets must fill; trimming and rounding cost a little


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


def probe(path: str | ClipFile) -> VideoInfo:
    """Return the metadata of a clip; see `scan`."""
    return scan(path)[0]


def scan(path: str | ClipFile) -> tuple[VideoInfo, np.ndarray]:
    """Read the packets of a clip; decode the first frame for the size and to check for a decoder.

    Returns:
        Metadata, and the presentation time of each frame in seconds, ascending (float64).

    Raises:
        ClipError: it cannot be read, holds no frames, or is shorter than its header states.
    """
    if is_picture(path):
        height, width = read_picture(path).shape[:2]
        return VideoInfo(1, 0.0, 0.0, height, width), np.zeros(1)
    packets: list[tuple[int, int]] = []
    first = None
    with open_video(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ClipError(path, f"is cut off or damaged after {len(packets)} frames; copy or encode it again")
            if first is None:
                first = next(iter(packet.decode()), None)
            if packet.size and not packet.is_discard:  # discarded: trimmed without encoding again
                time = packet.pts if packet.pts is not None else packet.dts
                packets.append((time or 0, packet.duration or 0))
        if first is None or not packets:
            raise ClipError(path, "holds no frames")
        base, stated = float(stream.time_base or 1), _stated_duration(container, stream)
    times = np.sort(np.array([time for time, _ in packets], dtype=np.float64)) * base
    fps = (len(times) - 1) / span if (span := float(times[-1] - times[0])) > 0 else 0.0
    end = max(max(time + length for time, length in packets) * base, times[-1] + (1 / fps if fps else 0.0))
    duration = float(end - times[0])
    if duration < _COMPLETE * stated:
        raise ClipError(path, f"ends after {duration:.2f} of {stated:.2f} seconds; copy or encode it again")
    turned = first.rotation % 180 != 0
    height, width = (first.width, first.height) if turned else (first.height, first.width)
    return VideoInfo(len(times), fps, duration, height, width), times


def read_frames(path: str | ClipFile, indices: Sequence[int], num_frames: int) -> np.ndarray:
    """Decode some frames of a clip.

    Args:
        path: the clip.
        indices: of the frames in display order, ascending and distinct.
        num_frames: of the clip, by `scan`.

    Returns:
        (T, H, W, 3) uint8, RGB.

    Raises:
        ClipError: neither decoder can decode these frames.
    """
    if is_picture(path):
        return read_picture(path)[None]
    try:
        return _read_decord(path, indices, num_frames)
    except Exception as error:  # decord raises errors of any type; PyAV reports the cause
        logger.debug("decord cannot read %s (%s); trying PyAV", path, str(error).splitlines()[:1])
    return _read_av(path, indices)


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


def decode_all(path: str | ClipFile, num_frames: int) -> None:
    """Decode a whole clip to find damage; discard the frames.

    Raises:
        ClipError: a frame is missing or damaged.
    """
    if is_picture(path):
        read_picture(path)
        return
    count = 0
    with open_video(path) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ClipError(path, f"frame {count} of {num_frames} is damaged; copy or encode it again")
            count += 1
    if count < num_frames:
        raise ClipError(path, f"only {count} of its {num_frames} frames can be decoded; encode it again")


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
        with av.open(opened(path), mode="r") as container:
            if not container.streams.video:
                raise ClipError(path, "holds no video")
            stream = container.streams.video[0]
            if thread_type is None:
                stream.codec_context.thread_count = 1
            else:
                stream.thread_type = thread_type
            yield container, stream
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ClipError(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, av.error.InvalidDataError | av.error.EOFError):
        return "is not a video, or a damaged one; copy or encode it again"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _stated_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Return the seconds of video that the header states, or 0."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:  # else it may be that of the audio
        return container.duration / av.time_base
    return 0.0


def _read_decord(path: str | ClipFile, indices: Sequence[int], num_frames: int) -> np.ndarray:
    # Import and open in the decoding process: a reader opened before a fork hangs.
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(opened(path), num_threads=1)
    if len(reader) != num_frames:
        raise ValueError(f"it counts {len(reader)} frames, not {num_frames}")
    return reader.get_batch(list(indices)).asnumpy()


def _read_av(path: str | ClipFile, indices: Sequence[int]) -> np.ndarray:
    """Decode from the start until all frames are found."""
    wanted, found = set(indices), []
    with open_video(path) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                # PyAV does not apply the rotation, which is counterclockwise in degrees.
                found.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
            if len(found) == len(wanted):
                return np.stack(found)
        raise ClipError(path, f"only {len(found)} of {len(wanted)} chosen frames can be decoded; encode it again")
