"""Select the frames of a clip by their timestamps, so that they have the configured frame rate.

Pure arithmetic; no file is opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgm.util import InputError

TIME_COMPRESSION = 4  # of the VAE: F = 4k + 1 frames become k + 1 latent frames
MAX_FPS = 990.0  # slow motion has up to 960 fps; higher rates come from damaged headers
_STILL = 1.5  # times the median: a longer gap between frames is a still stretch
_TOLERANCE = 1e-6  # of times, in seconds: they are rounded to the time base of the file


@dataclass(frozen=True)
class Selection:
    """The frames selected from a clip."""

    indices: tuple[int, ...]  # source frames in display order, padded with the last one
    num_frames: int  # length without padding
    effective_fps: float  # distinct frames per second among those; lower than requested for a slower source


def num_frames_4k1(value: int) -> int:
    """Return `value` if the VAE can encode that number of frames: 1, 5, 9, ...

    Raises:
        InputError: it cannot; the message lists the nearest numbers.
    """
    if value >= 1 and value % TIME_COMPRESSION == 1:
        return value
    below = (value - 1) // TIME_COMPRESSION * TIME_COMPRESSION + 1
    legal = [str(count) for count in (below, below + TIME_COMPRESSION) if count >= 1]
    raise InputError(
        f"max_num_frames is {value}; the VAE takes 4k + 1 frames (1, 5, ..., 49, ..., 81), so give {' or '.join(legal)}"
    )


def select_frames(
    times: Sequence[float] | np.ndarray,
    *,
    fps: float,
    max_num_frames: int,
    skip: tuple[int, int] = (0, 0),
    end: float | None = None,
) -> Selection:
    """Select the frames shown at equally spaced times, from the first frame that is not skipped; see `shown_frames`.

    So clips of any constant or variable frame rate keep their speed.

    Args:
        times: presentation time of each frame in seconds, ascending.
        fps: frames per second to select.
        max_num_frames: length of the result.
        skip: source frames skipped at the start and at the end; a single frame is a picture:
            it is never skipped, and gives one frame.
        end: until when the last frame is shown, in seconds; None is the usual time after it.

    Raises:
        ValueError: skipping leaves no frame, or the frame rate of the clip is implausible.
    """
    times = np.asarray(times, dtype=np.float64)
    if len(times) == 1:
        skip = (0, 0)
    stop = max(len(times) - skip[1], 0)
    usable = times[skip[0] : stop]
    if len(usable) == 0:
        raise ValueError(
            f"has {len(times)} frames; skipping {skip[0]} at the start and {skip[1]} at the end leaves none"
        )
    if len(usable) > 1:
        _check_rate(usable)
    gap = usual_gap(usable, default=1 / fps)
    if end is None or stop < len(times):
        end = float(times[stop]) if stop < len(times) else float(usable[-1]) + gap
    elapsed = end - usable[0] - min(gap, 1 / fps) / 2
    count = 1 if len(times) == 1 else min(max_num_frames, max(int((elapsed + _TOLERANCE) * fps) + 1, 1))
    taken = skip[0] + shown_frames(usable, usable[0] + np.arange(count) / fps, fps=fps)
    padded = np.concatenate([taken, np.repeat(taken[-1:], max_num_frames - count)])
    return Selection(tuple(padded.tolist()), count, fps * (len(np.unique(taken)) / count))


def shown_frames(times: np.ndarray, targets: np.ndarray, *, fps: float) -> np.ndarray:
    """Return, for each target, the index of the frame that is nearest to it, or that a still stretch shows.

    The next frame is nearest only if it comes within half a usual gap, and half a gap of the targets; so a frame that
    is shown for long, in a screen recording or slide show, stays to its end. Of two equally near frames the earlier one
    is selected.

    Args:
        times: presentation times of frames in seconds, ascending.
        targets: times in seconds.
        fps: rate of the targets.
    """
    after = np.searchsorted(times, targets).clip(0, len(times) - 1)
    before = (after - 1).clip(0)
    until = times[after] - targets
    is_near = until <= min(usual_gap(times, default=1 / fps), 1 / fps) / 2 + _TOLERANCE
    earlier = (targets - times[before] <= until + _TOLERANCE) | ~is_near
    return np.where(earlier, before, after)


def usual_gap(times: np.ndarray, *, default: float) -> float:
    """Return the mean time between frames in seconds without still stretches, or `default` for one frame."""
    gaps = np.diff(times)
    return float(gaps[gaps <= _STILL * np.median(gaps)].mean()) if len(gaps) else default


def _check_rate(times: np.ndarray) -> None:
    span = times[-1] - times[0]
    rate = (len(times) - 1) / span if span > 0 else float("inf")
    if rate > MAX_FPS:
        raise ValueError(f"says that it runs at {rate:.4g} frames per second, which no clip does; encode it again")
