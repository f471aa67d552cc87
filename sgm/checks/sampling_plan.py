"""Frames and size of samples: what a network can make, and what ``args`` asks for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sgm.config.args import SamplingArgs
from sgm.config.load import ConfigError, Problem
from sgm.modules.diffusionmodules.windows import LEAD_IN, TimeWindows
from sgm.modules.geometry import Geometry
from sgm.util import InputError, default
from sgm.weights.files import trained_scaling
from sgm.weights.lora.files import find_any_lora

_NETWORK = "model.network_config.params"


@dataclass(frozen=True)
class SamplingPlan:
    """Frames and size of a sampling run.

    Attributes:
        latents: latent frames of the result.
        padded_latents: latent frames for the network; the first ``padded_latents - latents`` are dropped.
        video_frames: frames of the result.
        size: (height, width) in pixels; None if it depends on each image (see `Geometry.size_for_image`).
        fps: frames per second.
        image2video: whether each sample starts from an image.
        windows: in which the network denoises it; None: whole.
        loop: whether its last frame leads into its first; the network then takes its last patch in front of it too.
    """

    latents: int
    padded_latents: int
    video_frames: int
    size: tuple[int, int] | None
    fps: int
    image2video: bool
    windows: TimeWindows | None = None
    loop: bool = False

    @property
    def latents_at_once(self) -> int:
        """Latent frames that the network takes at once, without padding."""
        taken = self.padded_latents if self.loop else self.latents
        return taken if self.windows is None else min(taken, self.windows.length)

    @property
    def decoded_latents(self) -> int:
        """Latent frames that the VAE decodes."""
        return self.latents + LEAD_IN * self.loop

    @property
    def seconds(self) -> float:
        """Duration of the result."""
        return self.video_frames / self.fps


def check_sampling(args: SamplingArgs, geometry: Geometry) -> SamplingPlan:
    """Check frames, size and input of a sampling run against the network, and fill in defaults.

    Raises:
        ConfigError: a frame count, size or kind of input is not supported by the network; names the nearest legal ones.
    """
    problems = [
        *_window_problems(args, geometry),
        *_frame_problems(args, geometry),
        *size_problems("args.sampling_image_size", args.sampling_image_size, geometry),
        *_input_problems(args, geometry),
        *_loop_problems(args, geometry),
        *scaling_problems(with_scaling(args, geometry)),
    ]
    if problems:
        raise ConfigError(problems)
    wanted = args.sampling_num_frames
    latents = geometry.legal_latents()[-1] if wanted is None else geometry.kept_latents(wanted)
    size = args.sampling_image_size
    if size is None:
        free = geometry.image_conditioned and geometry.patch_size[0] > 1 and not geometry.fixed_size
        size = None if free else geometry.default_size()
    padded = geometry.padded_latents(latents)
    if args.loop:  # one patch of those that the network takes is in front of it
        latents = padded - geometry.patch_size[0]
    return SamplingPlan(
        latents=latents,
        padded_latents=padded,
        video_frames=geometry.time_compression * latents if args.loop else geometry.video_frames(latents),
        size=size,
        fps=args.sampling_fps,
        image2video=geometry.image_conditioned,
        windows=None if args.time_window is None else _windows(args, geometry.patch_size[0]),
        loop=args.loop,
    )


def with_scaling(args: SamplingArgs, geometry: Geometry) -> Geometry:
    """Return the shapes of a network that ``args.time_scaling`` gives longer clips."""
    return replace(geometry, longer=args.time_scaling is not None)


def scaling_problems(geometry: Geometry) -> list[Problem]:
    """Return a problem of ``args.time_scaling`` if the network has no rotary positions for all lengths."""
    if not (geometry.longer and geometry.fixed_size):
        return []
    found = f"is given, and the {geometry.positions} positions of this network are a table of fixed length"
    return [Problem("args.time_scaling", "", found, "remove it; to sample longer clips, set args.time_window")]


def scaling_warnings(args: SamplingArgs, geometry: Geometry, longest: int) -> Iterator[str]:
    """Yield what is hardly meant of ``args.time_scaling`` if the network takes up to `longest` latents at once."""
    trained = geometry.max_latents
    if args.time_scaling is not None and geometry.padded_latents(longest) <= geometry.padded_latents(trained):
        yield (
            f"args.time_scaling is {args.time_scaling}, and has no effect: no clip is longer than "
            f"{_NETWORK}.num_frames, {geometry.video_frames(trained)} frames"
        )
    elif args.time_scaling == "extrapolate":
        yield (
            f"args.time_scaling is extrapolate: positions of {geometry.video_frames(longest)} frames, and the network "
            f"was trained on {geometry.video_frames(trained)}; clips tend to repeat. args.time_scaling=riflex avoids it"
        )
    if geometry.padded_latents(longest) > geometry.padded_latents(trained):
        for path in (args.load, *(entry.path for entry in args.loras)):
            scaling = None if path is None else _trained_scaling(path)
            if scaling not in (None, args.time_scaling):
                own = default(args.time_scaling, "null")
                yield (
                    f"{path} was trained with args.time_scaling={scaling}, and it is {own}: longer clips have other "
                    "positions than in its training"
                )


def _trained_scaling(path: str) -> str | None:
    """Return the scaling that weights or adapters were trained with; None for files that cannot be read."""
    try:
        return trained_scaling(find_any_lora(path))
    except InputError:
        return None


def _windows(args: SamplingArgs, patch: int) -> TimeWindows:
    assert args.time_window is not None
    half = args.time_window // (2 * patch) * patch
    return TimeWindows(args.time_window, default(args.time_window_overlap, half), patch)


def _window_problems(args: SamplingArgs, geometry: Geometry) -> Iterator[Problem]:
    if args.time_window is None:
        return
    patch, longest = geometry.patch_size[0], geometry.padded_latents(geometry.max_latents)
    windows = _windows(args, patch)
    frames = f"{patch} latent frames, the temporal patch" if patch > 1 else "1 latent frame"
    if windows.length % patch or windows.length < 2 * patch:
        cure = f"give a multiple of {frames}, and {2 * patch} or more, such as {longest}"
        yield Problem("args.time_window", "", f"is {windows.length}", cure)
    elif windows.length > longest and (args.time_scaling is None or geometry.fixed_size):
        found = f"is {windows.length} latent frames, and the network was trained on {longest} at once"
        yield Problem("args.time_window", "", found, f"give {longest} or fewer")
    given = args.time_window_overlap
    if given is not None and (given % patch or not patch <= given < windows.length):
        cure = f"give a multiple of {frames}, less than time_window {windows.length}; null is half of it"
        yield Problem("args.time_window_overlap", "", f"is {windows.overlap}", cure)


def _loop_problems(args: SamplingArgs, geometry: Geometry) -> Iterator[Problem]:
    if not args.loop:
        return
    takes = "an image" if geometry.image_conditioned else "a control" if geometry.control_channels else None
    if takes is not None:
        found = f"is true, and the network takes {takes}, which belongs to one frame; a loop begins with any"
        yield Problem("args.loop", "", found, "set it to false, or use a text-to-video model")
    wanted, patch = default(args.sampling_num_frames, geometry.max_latents), geometry.patch_size[0]
    if geometry.padded_latents(geometry.kept_latents(wanted)) < 2 * patch:
        found = f"is {wanted}, of which a loop has {'none' if patch == 1 else 'too few'}"
        yield Problem("args.sampling_num_frames", "", found, f"give {patch + 1} or more")


def _frame_problems(args: SamplingArgs, geometry: Geometry) -> Iterator[Problem]:
    wanted, legal = args.sampling_num_frames, geometry.legal_latents()
    if wanted is None or args.time_window is not None:
        return
    if with_scaling(args, geometry).frames_are_legal(geometry.video_frames(geometry.kept_latents(wanted))):
        return
    kept = geometry.kept_latents(wanted)
    closest = min(legal, key=lambda latents: abs(latents - kept))
    cure = (
        f"nearest legal: {closest} latent frames = {geometry.video_frames(closest)} video frames; "
        f"legal: {listed_numbers(legal)} latent frames ({listed_numbers(geometry.legal_frames())} video frames)"
    )
    if wanted in geometry.legal_frames():
        latents = (wanted - 1) // geometry.time_compression + 1
        cure += f"; if you mean {wanted} video frames, write {latents}"
    if not geometry.fixed_size and kept > legal[-1]:
        longest = kept - (kept % 2 == 0 and geometry.patch_size[0] == 2)  # 42 of the reference: 41 with a padding frame
        cure += "; args.time_scaling=riflex scales rotary positions to more; if the weights were trained on so many, "
        cure += f"{_NETWORK}.num_frames={geometry.video_frames(longest)} allows it"
    if kept > legal[-1]:
        cure += f"; args.time_window={geometry.padded_latents(legal[-1])} denoises longer clips in windows"
    found = f"{wanted} latent frames ({geometry.video_frames(kept)} video frames) are more than the network supports"
    yield Problem("args.sampling_num_frames", "", found, cure)


def size_problems(path: str, size: Any, geometry: Geometry) -> list[Problem]:
    """Return a problem if the (height, width) in pixels at `path` is illegal, with the nearest legal size."""
    if size is None or geometry.size_is_legal(*size):
        return []
    best, steps, most = geometry.nearest_size(*size), geometry.size_steps, geometry.max_size
    legal = (
        f"the {geometry.positions} positions of this network fit that size only"
        if geometry.fixed_size
        else f"height: multiples of {steps[0]} up to {most[0]}, width: multiples of {steps[1]} up to {most[1]}"
    )
    found = f"{size[0]}x{size[1]} (height x width) is no size that the network can take"
    return [Problem(path, "", found, f"nearest legal: {path}=[{best[0]},{best[1]}]; {legal}")]


def _input_problems(args: SamplingArgs, geometry: Geometry) -> Iterator[Problem]:
    if args.video is not None and geometry.image_conditioned:
        found = "is given, and the network makes videos from an image"
        yield Problem("args.video", "", found, "remove it, or use a text-to-video model")
    for key in ("control", "control_strength"):
        if getattr(args, key) is not None and not geometry.control_channels:
            found = "is given, and the network takes no control (control_channels is 0)"
            yield Problem(
                f"args.{key}", "", found, "add configs/control/video.yaml and weights that were trained with it"
            )
    channels = f"in_channels {geometry.in_channels}, out_channels {geometry.out_channels}"
    if args.image2video is True and not geometry.image_conditioned:
        found = f"is true, but the network takes no image ({channels})"
        yield Problem("args.image2video", "", found, "set args.image2video=false, or use an image-to-video (i2v) model")
    if args.image2video is False and geometry.image_conditioned:
        found = f"is false, but the network needs an image ({channels})"
        cure = "set args.image2video=true and write prompt@@image lines, or use a text-to-video model"
        yield Problem("args.image2video", "", found, cure)
    if args.latent_channels not in (None, geometry.out_channels):
        found = f"is {args.latent_channels}, but the network makes latents of {geometry.out_channels} channels"
        cure = f"set args.latent_channels={geometry.out_channels}, or remove it"
        yield Problem("args.latent_channels", "", found, cure)


def listed_numbers(numbers: list[int]) -> str:
    """Return numbers as text, of many the first and the last ones."""
    if len(numbers) < 5:
        return ", ".join(map(str, numbers))
    return f"{numbers[0]}, {numbers[1]}, {numbers[2]}, ..., {numbers[-1]}"
