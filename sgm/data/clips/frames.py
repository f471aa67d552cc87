"""Select the frames of a clip by their timestamps, so that they have the configured frame rate.

Pure arithmetic; no file is opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgm.util import InputError

TIME_COMPRESSION = 4  # of the VAE: F = 4k + 1 frames become k + 1 latent frames
# Slow motion has 240 fps; other rates come from damaged headers. The margins allow for rounded timestamps.
MIN_FPS, MAX_FPS = 0.99, 245.0
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
    times: Sequence[float] | np.ndarray, *, fps: float, max_num_frames: int, skip: tuple[int, int] = (0, 0)
) -> Selection:
    """Select the frames nearest to equally spaced times, from the first frame that is not skipped.

    Every frame is within half a source frame of its time; of two equally near frames the earlier one is selected. So
    clips of any constant or variable frame rate keep their speed.

    Args:
        times: presentation time of each frame in seconds, ascending.
        fps: frames per second to select.
        max_num_frames: length of the result.
        skip: source frames skipped at the start and at the end; a single frame, a picture, is never skipped.

    Raises:
        ValueError: skipping leaves no frame, or the frame rate of the clip is implausible.
    """
    if len(times) == 1:
        skip = (0, 0)
    usable = np.asarray(times, dtype=np.float64)[skip[0] : max(len(times) - skip[1], 0)]
    if len(usable) == 0:
        raise ValueError(
            f"has {len(times)} frames; skipping {skip[0]} at the start and {skip[1]} at the end leaves none"
        )
    gap = 1 / fps
    if len(usable) > 1:
        gap = float(np.median(np.diff(usable)))
        _check_rate(usable)
    elapsed = usable[-1] - usable[0] + gap / 2
    count = min(max_num_frames, int((elapsed + _TOLERANCE) * fps) + 1)
    taken = skip[0] + _nearest(usable, usable[0] + np.arange(count) / fps)
    padded = np.concatenate([taken, np.repeat(taken[-1:], max_num_frames - count)])
    return Selection(tuple(padded.tolist()), count, fps * (len(np.unique(taken)) / count))


def _check_rate(times: np.ndarray) -> None:
    span = times[-1] - times[0]
    rate = (len(times) - 1) / span if span > 0 else float("inf")
    if not MIN_FPS <= rate <= MAX_FPS:
        raise ValueError(f"says that it runs at {rate:.4g} frames per second, which no clip does; encode it again")


def _nearest(times: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return, for each target, the index of the nearest of the ascending `times`."""
    after = np.searchsorted(times, targets).clip(0, len(times) - 1)
    before = (after - 1).clip(0)
    earlier = targets - times[before] <= times[after] - targets + _TOLERANCE
    return np.where(earlier, before, after)
