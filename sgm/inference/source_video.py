"""The clips that sampling is given: ``args.video`` to change and its mask, others to hold, and controls.

Legend: T frames, H, W pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from sgm.checks.sampling_plan import SamplingPlan
from sgm.config.args import SamplingArgs
from sgm.config.load import Problem
from sgm.data.clips.masks import latent_mask, white
from sgm.inference.video import to_uint8
from sgm.util import InputError, nearest_path

if TYPE_CHECKING:
    from sgm.data.clips.decode import Scan

_CHUNK = 8  # frames resized at a time: those of a large clip need gigabytes
HeldKey = Literal["start", "end"]
_HELD: tuple[HeldKey, ...] = ("start", "end")


@dataclass(frozen=True)
class HeldClip:
    """A clip of which frames are held in the result.

    Attributes:
        path: its file.
        scanned: its metadata.
        indices: all its frames at the frame rate of the result.
        num: how many of them are held: the last ones of a start, the first ones of an end.
        latents: latent frames that they are held in.
    """

    path: str
    scanned: "Scan"
    indices: tuple[int, ...]
    num: int
    latents: int


@dataclass(frozen=True)
class EncodedClips:
    """What sampling takes of its clips, for results of one size.

    Attributes:
        size: (H, W) in pixels.
        inputs: keyword arguments of `SATVideoDiffusionEngine.sample`.
        image: the first held frame of a start (1, 3, H, W), which an image-to-video model takes as its image.
        before: all frames of a start (T, H, W, 3), uint8, written instead of the first `num_held` decoded ones.
        num_held: frames of the start that are held.
    """

    size: tuple[int, int]
    inputs: dict[str, Any]
    image: torch.Tensor | None = None
    before: torch.Tensor | None = None
    num_held: int = 0

    def joined(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the frames to write for the decoded ones (T, H, W, 3), uint8."""
        return frames if self.before is None else torch.cat((self.before, frames[self.num_held :]))


def check_clip(args: SamplingArgs, plan: SamplingPlan, key: Literal["video", "mask", "start", "end"]) -> str:
    """Check that the clip of a key can be decoded and is long enough; return a description.

    Raises:
        InputError: it is missing, damaged or too short; or a mask is of another shape than the video, or has no effect.
    """
    if key == "video":
        return _check_source(args, plan)
    if key == "mask":
        return _check_mask(args, plan)
    clip = held_clip(args, plan, key)
    _require_frames(clip.path, clip.indices if key == "start" else clip.indices[: clip.num], clip.scanned)
    shown = "the picture" if clip.num == 1 else f"its {'last' if key == 'start' else 'first'} {clip.num} frames"
    info, text = clip.scanned.info, f"held: {shown}, in {clip.latents} of {plan.latents} latent frames"
    if key == "start":
        new = plan.video_frames - clip.num
        text += f"; written: {_frames(len(clip.indices))} of it at {plan.fps} fps, then {new} new ones"
    return f"{clip.path} ({info.height}x{info.width}): {text}"


def held_problems(args: SamplingArgs, plan: SamplingPlan) -> Iterator[Problem]:
    """Yield what is wrong with clips of which frames are held, each of which `check_clip` takes."""
    clips = {key: held_clip(args, plan, key) for key in _HELD if getattr(args, key) is not None}
    if not clips:
        return
    names, verb = " and ".join(clips), "hold" if len(clips) > 1 else "holds"
    pictures = all(clip.num == 1 for clip in clips.values())
    if pictures and args.held_frames is not None:
        found = f"is {args.held_frames}, and {names} {verb} one frame, as a picture does"
        yield Problem("args.held_frames", "", found, "remove it, or give a video")
    if (held := sum(clip.latents for clip in clips.values())) >= plan.latents:
        fewer = "" if pictures else ", or a smaller args.held_frames (4 fewer hold one latent frame less)"
        found = f"gives {plan.latents}, and {names} {verb} {held} latent frames, so that nothing is sampled"
        enough = held + 1 + plan.padded_latents - plan.latents
        yield Problem("args.sampling_num_frames", "", found, f"set it to {enough} or more{fewer}")


def _check_source(args: SamplingArgs, plan: SamplingPlan) -> str:
    return f"{check_whole(str(args.video), plan)}; strength {args.noise_strength:g}"


def _check_mask(args: SamplingArgs, plan: SamplingPlan) -> str:
    from sgm.data.clips.check import shape_problem  # lazy: slow to import

    assert plan.size is not None, "a network that takes a video has one size"
    if problem := shape_problem(_scan(str(args.video)).info, _scan(str(args.mask)).info):
        raise InputError(f"{args.mask} {problem}")
    share = load_mask(str(args.mask), plan, plan.size).float().mean().item()
    return f"{args.mask}: {share:.0%} of the video is sampled anew"


def check_whole(path: str, plan: SamplingPlan) -> str:
    """Check that a clip can be decoded and is as long as the result; return a description.

    Raises:
        InputError: it is missing, damaged or too short.
    """
    scanned, indices, info = _selected(path, plan)
    _require_frames(path, indices, scanned)
    taken = f"{plan.video_frames} frames at {plan.fps} fps, from {indices[0]} to {indices[-1]} of {info.num_frames}"
    return f"{path} ({info.height}x{info.width}): {taken}"


def start_size(args: SamplingArgs) -> tuple[int, int]:
    """Return (H, W) of ``args.start`` in pixels."""
    info = _scan(str(args.start)).info
    return info.height, info.width


def encode_clips(args: SamplingArgs, plan: SamplingPlan, size: tuple[int, int], engine: Any) -> EncodedClips:
    """Read and encode the clips of a run for results of a size, (H, W) in pixels.

    Raises:
        InputError: as `check_clip`.
    """

    def encode(frames: torch.Tensor) -> torch.Tensor:
        # The mean of the posterior: a clip does not depend on the seed.
        return engine.encode_first_stage(frames[None].to(engine.device), sample=False)

    if args.video is not None:
        inputs: dict[str, Any] = {"strength": args.noise_strength}
        inputs["source"] = encode(load_whole(str(args.video), plan, size))
        if args.mask is not None:
            inputs["mask"] = load_mask(args.mask, plan, size)
        return EncodedClips(size, inputs)
    made: dict[str, Any] = {"inputs": {}}
    if args.start is not None:
        clip = held_clip(args, plan, "start")
        before = torch.cat([to_uint8(piece) for piece in _resized(clip.path, clip.indices, clip.scanned, size)])
        frames = before[-clip.num :].permute(0, 3, 1, 2) / 127.5 - 1
        made = {"inputs": {"start": encode(frames)}, "image": frames[:1], "before": before, "num_held": clip.num}
    if args.end is not None:
        clip = held_clip(args, plan, "end")
        frames = torch.cat([*_resized(clip.path, clip.indices[: clip.num], clip.scanned, size)])
        if clip.num == 1:
            frames = frames.expand(5, -1, -1, -1)
        # The first latent frame holds a single frame, as in the beginning of a clip; the others, as here, four.
        made["inputs"]["end"] = encode(frames)[:, 1:]
    return EncodedClips(size, **made)


def held_clip(args: SamplingArgs, plan: SamplingPlan, key: HeldKey) -> HeldClip:
    """Select the frames of ``args.start`` or ``args.end`` at the frame rate of the result, and those held.

    Raises:
        InputError: it is missing, damaged or too short.
    """
    path = str(getattr(args, key))
    scanned = _scan(path)
    is_picture = scanned.info.num_frames == 1
    most = 1 if is_picture else int(scanned.info.duration * plan.fps) + 2
    indices = _indices(path, scanned, plan.fps, most)
    num = 1 if is_picture else args.num_held
    if len(indices) < num:
        fewer = (len(indices) - 1) // 4 * 4 + 1
        cure = (
            f"set args.held_frames={fewer}, or give a longer clip" if fewer >= 5 else "give a picture or a longer clip"
        )
        raise InputError(f"{path} has {_frames(len(indices))} at {plan.fps} fps, and {num} are held; {cure}")
    latents = 1 if is_picture else (num - 1) // 4 + (key == "start")
    return HeldClip(path, scanned, indices, num, latents)


def load_whole(path: str, plan: SamplingPlan, size: tuple[int, int]) -> torch.Tensor:
    """Return the frames of a clip for those of the result, scaled to cover `size` and cropped: (T, 3, H, W) in [-1, 1].

    Raises:
        InputError: as `check_whole`.
    """
    scanned, indices, _ = _selected(path, plan)
    return torch.cat([*_resized(path, indices, scanned, size)])


def load_mask(path: str, plan: SamplingPlan, size: tuple[int, int]) -> torch.Tensor:
    """Return where latents are sampled: bool (1, T, 1, H/8, W/8), true if any of their pixels is white.

    Args:
        path: a picture, for all frames, or a video, whose frames are taken as those of a clip (`load_whole`).
        plan: of the run.
        size: (H, W) of the result in pixels.

    Raises:
        InputError: it cannot be read, is too short, or is black or white throughout.
    """
    scanned = _scan(path)
    if scanned.info.num_frames == 1:
        frames = torch.cat([*_resized(path, (0,), scanned, size)]).expand(plan.video_frames, -1, -1, -1)
    else:
        frames = load_whole(path, plan, size)
    mask = latent_mask(white(frames))
    for throughout, colour, effect in (
        (bool(mask.all()), "white", "nothing of the video stays"),
        (not bool(mask.any()), "black", "nothing is sampled"),
    ):
        if throughout:
            cure = "paint white what is to be sampled, and the rest black"
            raise InputError(f"{path} is {colour} throughout, so {effect}; {cure}")
    return mask


def _resized(path: str, indices: Sequence[int], scanned: "Scan", size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Yield frames a few at a time, scaled to cover `size` and cropped: (T, 3, H, W) in [-1, 1]."""
    from sgm.data.clips.transform import cover_crop  # lazy: slow to import

    frames = _pictures(path, indices, scanned)
    while pictures := list(islice(frames, _CHUNK)):
        piece = torch.stack([torch.from_numpy(picture) for picture in pictures]).permute(0, 3, 1, 2)
        yield cover_crop(piece, size)


def _pictures(path: str, indices: Sequence[int], scanned: "Scan") -> Iterator[np.ndarray]:
    """Yield frames (H, W, 3) uint8 in the size of the file.

    Raises:
        InputError: one cannot be decoded.
    """
    from sgm.data.clips.decode import ClipError, each_frame, read_picture  # lazy: slow to import
    from sgm.data.rows import is_picture

    for picture in iter([read_picture(path)]) if is_picture(path) else each_frame(path, indices, scanned):
        if isinstance(picture, ClipError):
            raise InputError(f"{picture.path}: {picture.reason}") from picture
        yield picture


def _require_frames(path: str, indices: Sequence[int], scanned: "Scan") -> None:
    """Decode the frames that sampling takes: damage within a file is in no header, and models load for minutes."""
    for _ in _pictures(path, indices, scanned):
        pass


def _frames(num: int) -> str:
    return f"{num} frame{'s' * (num != 1)}"


def _scan(path: str) -> "Scan":
    from sgm.data.clips.decode import ClipError, scan  # lazy: slow to import

    if not Path(path).exists():
        raise InputError(f"there is no file '{path}'{nearest_path(path)}; name one that exists")
    try:
        return scan(path)
    except ClipError as error:
        raise InputError(f"{error.path}: {error.reason}") from error


def _indices(path: str, scanned: "Scan", fps: int, most: int) -> tuple[int, ...]:
    """Return the frames shown at a rate, `most` at most, from the first."""
    from sgm.data.clips.frames import select_frames  # lazy: slow to import

    end = scanned.times[0] + scanned.info.duration
    try:
        chosen = select_frames(scanned.times, fps=fps, max_num_frames=most, end=end)
    except ValueError as error:
        raise InputError(f"{path}: {error}; give another video") from error
    return chosen.indices[: chosen.num_frames]


def _selected(path: str, plan: SamplingPlan):
    """Return the scan of a clip, the frames for those of the result, and its metadata."""
    scanned = _scan(path)
    indices = _indices(path, scanned, plan.fps, plan.video_frames)
    if len(indices) < plan.video_frames:
        longest = (len(indices) - 1) // 4 + 1
        raise InputError(
            f"{path} has {_frames(len(indices))} at {plan.fps} fps, and the result {plan.video_frames}; set "
            f"args.sampling_num_frames={longest} ({_frames(4 * longest - 3)}), or give a longer video"
        )
    return scanned, indices, scanned.info
