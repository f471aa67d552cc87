"""Clips: what their containers say, and the pictures of chosen frames. A picture file is a clip of one frame.

Times and counts always come from PyAV, which reads the packets without decoding them; pictures come from decord, and
from PyAV where decord is missing, fails or counts otherwise. Both turn pictures upright and give equal pixels.

Legend: T frames, H W pixels of an upright picture.
"""

from collections.abc import Iterator, Sequence

import av
import av.error
import numpy as np
from PIL import Image, ImageOps

from sgm.data.rows import ClipFile, VideoInfo, is_picture, opened
from sgm.log import get_logger
from sgm.util import RunError

logger = get_logger(__name__)

# Share of the duration that a container states and its packets must fill; trimming and rounding take a little.
_COMPLETE = 0.9


class ClipError(RunError):
    """A clip cannot be used. Training replaces it by another one and goes on.

    Attributes:
        path: the clip.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | ClipFile, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(f"clip {path}: {reason}")

    def __reduce__(self) -> tuple[type["ClipError"], tuple[str, str]]:
        """Pickle by what the constructor takes; the default would give it the message alone."""
        return ClipError, (self.path, self.reason)


def probe(path: str | ClipFile) -> VideoInfo:
    """Return what is known of a clip; see `scan`."""
    return scan(path)[0]


def scan(path: str | ClipFile) -> tuple[VideoInfo, np.ndarray]:
    """Read a clip's packets, and decode its first frame, which tells the size and that there is a decoder.

    Returns:
        What is known of the clip, and when each of its frames is shown, in seconds, ascending (float64).

    Raises:
        ClipError: it cannot be read, holds no frames, or ends before the end that its header states.
    """
    if is_picture(path):
        height, width = read_picture(path).shape[:2]
        return VideoInfo(1, 0.0, 0.0, height, width), np.zeros(1)
    packets: list[tuple[int, int]] = []
    first = None
    with _Reading(path) as reading:
        for packet in reading.container.demux(reading.stream):
            if packet.is_corrupt:
                raise ClipError(path, f"is cut off or damaged after {len(packets)} frames; copy or encode it again")
            if first is None:
                first = next(iter(packet.decode()), None)
            if packet.size and not packet.is_discard:  # discarded: cut away without encoding again
                time = packet.pts if packet.pts is not None else packet.dts
                packets.append((time or 0, packet.duration or 0))
        if first is None or not packets:
            raise ClipError(path, "holds no frames")
        base, stated = float(reading.stream.time_base or 1), _stated_duration(reading)
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
    """Decode frames of a clip, and no more than they need.

    Args:
        path: the clip.
        indices: which frames, in order of display, ascending, each once.
        num_frames: how many the clip has, by `scan`.

    Returns:
        (T, H, W, 3) uint8, RGB.

    Raises:
        ClipError: neither decoder gives these frames.
    """
    if is_picture(path):
        return read_picture(path)[None]
    try:
        return _read_decord(path, indices, num_frames)
    except Exception as error:  # decord raises what it likes; the second decoder says what is wrong
        logger.debug("decord cannot read %s (%s); trying PyAV", path, str(error).splitlines()[:1])
    return _read_av(path, indices)


def read_picture(path: str | ClipFile) -> np.ndarray:
    """Decode a picture file: (H, W, 3) uint8, RGB, upright; transparent parts are white.

    Raises:
        ClipError: it cannot be decoded.
    """
    try:
        with Image.open(opened(path)) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
            return np.array(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))
    except FileNotFoundError as error:
        raise ClipError(path, "does not exist") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipError(path, f"is no picture, or a damaged one: {error}") from error


def decode_all(path: str | ClipFile, num_frames: int) -> None:
    """Decode a whole clip, keeping nothing, to see that it can be decoded.

    Raises:
        ClipError: a frame is missing or damaged.
    """
    if is_picture(path):
        read_picture(path)
        return
    count = 0
    with _Reading(path) as reading:
        for frame in reading.frames():
            if frame.is_corrupt:
                raise ClipError(path, f"frame {count} of {num_frames} is damaged; copy or encode it again")
            count += 1
    if count < num_frames:
        raise ClipError(path, f"only {count} of its {num_frames} frames can be decoded; encode it again")


class _Reading:
    """A clip that is open in PyAV, as a context; every failure inside becomes a ClipError."""

    def __init__(self, path: str | ClipFile) -> None:
        self.path = path

    def __enter__(self) -> "_Reading":
        try:
            self.container = av.open(opened(self.path), mode="r")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise ClipError(self.path, _reason(error)) from error
        if not self.container.streams.video:
            self.container.close()
            raise ClipError(self.path, "holds no video")
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # clips are decoded side by side
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.container.close()
        if isinstance(error, (av.error.FFmpegError, OSError, ValueError)):
            raise ClipError(self.path, _reason(error)) from error

    def frames(self) -> Iterator[av.VideoFrame]:
        """Decode all frames in order of display."""
        yield from self.container.decode(self.stream)


def _reason(error: Exception) -> str:
    if isinstance(error, av.error.InvalidDataError | av.error.EOFError):
        return "is no video, or a damaged one; copy or encode it again"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _stated_duration(reading: _Reading) -> float:
    """Return the seconds of video that the header promises, or 0 where it does not say."""
    stream, container = reading.stream, reading.container
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:  # else it may be that of the sound
        return container.duration / av.time_base
    return 0.0


def _read_decord(path: str | ClipFile, indices: Sequence[int], num_frames: int) -> np.ndarray:
    # Imported and opened here, in the process that decodes: a reader that was open before a fork never answers.
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(opened(path), num_threads=1)
    if len(reader) != num_frames:
        raise ValueError(f"it counts {len(reader)} frames, not {num_frames}")
    return reader.get_batch(list(indices)).asnumpy()


def _read_av(path: str | ClipFile, indices: Sequence[int]) -> np.ndarray:
    """Decode from the start, as chosen frames begin there, until all are found."""
    wanted, pictures = set(indices), []
    with _Reading(path) as reading:
        for index, frame in enumerate(reading.frames()):
            if index in wanted:
                # PyAV turns nothing by itself; rotation is in degrees against the clock.
                pictures.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
            if len(pictures) == len(wanted):
                return np.stack(pictures)
        raise ClipError(path, f"only {len(pictures)} of {len(wanted)} chosen frames can be decoded; encode it again")
