"""The video that sampling starts from: ``args.video``.

Legend: T frames, H, W pixels.
"""

from pathlib import Path

import torch

from sgm.checks.sampling import SamplingPlan
from sgm.config.args import SamplingArgs
from sgm.util import InputError, nearest_path

_CHUNK = 8  # frames resized at a time: as floats, those of a large clip need gigabytes


def check_source(args: SamplingArgs, plan: SamplingPlan) -> str:
    """Check that the video can be read and is long enough; return a description.

    Raises:
        InputError: it is missing, damaged or too short.
    """
    path, (_, indices, info) = str(args.video), _selected(args, plan)
    seconds = f"{plan.video_frames} frames at {plan.fps} fps, from {indices[0]} to {indices[-1]} of {info.num_frames}"
    return f"{path} ({info.height}x{info.width}): {seconds}; strength {args.noise_strength:g}"


def load_source(args: SamplingArgs, plan: SamplingPlan, size: tuple[int, int]) -> torch.Tensor:
    """Return the frames at the frame rate of the result, scaled to cover `size` and cropped: (T, 3, H, W) in [-1, 1].

    Raises:
        InputError: as `check_source`.
    """
    from sgm.data.clips.decode import ClipError, read_frames  # lazy: slow to import
    from sgm.data.clips.transform import cover_crop

    scanned, indices, _ = _selected(args, plan)
    distinct = sorted(set(indices))
    try:
        pictures = torch.from_numpy(read_frames(str(args.video), distinct, scanned)).permute(0, 3, 1, 2)
    except ClipError as error:
        raise InputError(f"args.video {error.path}: {error.reason}") from error
    frames = torch.cat([cover_crop(piece.float() / 127.5 - 1, size) for piece in pictures.split(_CHUNK)])
    return frames[[distinct.index(index) for index in indices]]


def _selected(args: SamplingArgs, plan: SamplingPlan):
    """Return the scan of the video, the frames that the result begins from, and its metadata."""
    from sgm.data.clips.decode import ClipError, scan  # lazy: slow to import
    from sgm.data.clips.frames import select_frames

    path = Path(str(args.video))
    if not path.is_file():
        raise InputError(f"there is no file '{path}'{nearest_path(path)}; name a video")
    try:
        scanned = scan(str(path))
        end = scanned.times[0] + scanned.info.duration
        chosen = select_frames(scanned.times, fps=plan.fps, max_num_frames=plan.video_frames, end=end)
    except ClipError as error:
        raise InputError(f"{error.path}: {error.reason}") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}; give another video") from error
    if chosen.num_frames < plan.video_frames:
        longest = (chosen.num_frames - 1) // 4 + 1
        raise InputError(
            f"{path} has {chosen.num_frames} frames at {plan.fps} fps, and the result {plan.video_frames}; set "
            f"args.sampling_num_frames={longest} ({4 * longest - 3} frames), or give a longer video"
        )
    return scanned, chosen.indices, scanned.info
