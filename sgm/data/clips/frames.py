"""Which frames of a clip are trained on: chosen by their times, so that the frame rate is the configured one.

Pure arithmetic on timestamps; nothing is opened or decoded here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgm.util import InputError

TIME_COMPRESSION = 4  # of the VAE: F = 4k + 1 frames become k + 1 latent frames
# Slow motion is filmed at 240; what is outside comes from a damaged header. The margins are for rounded timestamps.
MIN_FPS, MAX_FPS = 0.99, 245.0
_TOLERANCE = 1e-6  # of times, in seconds: they are rounded to the time base of the file


@dataclass(frozen=True)
class Selection:
    """The frames taken from a clip.

    Attributes:
        indices: source frames in order of display; the last one is repeated where the clip is too short.
        num_frames: how many of them the clip gave, before the last one was repeated.
        effective_fps: different frames per second among those; less than asked where the source is slower.
    """

    indices: tuple[int, ...]
    num_frames: int
    effective_fps: float


def num_frames_4k1(value: int) -> int:
    """Return `value`, a number of frames that the VAE can turn into latents: 1, 5, 9, ...

    Raises:
        InputError: it is no such number; the message names the nearest ones.
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
    """Choose the frames nearest to equally spaced times, beginning with the first that is not skipped.

    Every chosen frame is within half a source frame of the time that it stands for; of two equally near the earlier
    one is taken. Times, not counts, decide, so clips of any and of varying frame rate play at their true speed.

    Args:
        times: when each frame is shown, in seconds, ascending.
        fps: frames per second to take.
        max_num_frames: length of the result.
        skip: source frames left out at the start and at the end; a picture, a single frame, is taken all the same.

    Raises:
        ValueError: skipping leaves no frame, or the frame rate of the clip cannot be true.
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
