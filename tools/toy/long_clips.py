"""Measure with the toy, trained on 17 frames, what clips of 33 and 65 frames show.

    python tools/toy/long_clips.py --write assets/toy/long_clips.json

Clips of captions that training never saw are sampled with positions as they are, scaled as RIFLEx does, and in windows.
Colour and shape are those of the caption. The motion goes on if the shape moves as the caption says from the first
quarter of the clip to the last, and never jumps: its centre moves 4 pixels at most from one frame to the next.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import from_video
import numpy as np
import quality
import scene

from sgm.cli import run_command, tool_parser
from sgm.io import write_json
from sgm.modules.diffusionmodules.windows import TimeWindows

WAYS: dict[str, tuple[str, TimeWindows | None]] = {
    "extrapolate": ("extrapolate", None),
    "riflex": ("riflex", None),
    "windows": ("extrapolate", TimeWindows(length=5, overlap=4)),
}
JUMP = 4.0  # pixels between frames; shapes of training move less than 2


def measured(engine: Any, way: str, num_frames: int, num_clips: int, *, num_steps: int | None = None) -> dict[str, Any]:
    """Return the shares of clips with the right colour, the right shape, without jumps, and whose motion goes on."""
    scaling, engine.windows = WAYS[way]
    engine.network.use_time_scaling(scaling)
    clips = quality.held_out_clips(num_clips, seed=7)
    shape = ((num_frames - 1) // 4 + 1, *quality.LATENT_SHAPE[1:])
    videos = quality.sample_together(engine, clips, shape=shape, num_steps=num_steps)
    found = [_judged(video, clip) for video, clip in zip(videos, clips, strict=True)]
    return {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}


def _judged(video: np.ndarray, clip: scene.Clip) -> dict[str, bool]:
    shown, centres = scene.measure(video), from_video.centres(video)
    smooth = bool(np.abs(np.diff(centres, axis=0)).max() <= JUMP)
    quarter = len(centres) // 4
    moved = (centres[-quarter:].mean(axis=0) - centres[:quarter].mean(axis=0)) @ np.array(
        scene.DIRECTIONS[clip.direction]
    )
    return {
        "colour": shown.colour == clip.colour,
        "shape": shown.shape == clip.shape,
        "smooth": smooth,
        "motion": smooth and bool(moved > JUMP),
    }


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    engine = quality.load_engine("configs/toy.yaml")
    found: dict[str, Any] = {"clips": options.num_clips}
    sys.stdout.write("| frames | | colour | shape | without jumps | motion |\n|---|---|---|---|---|---|\n")
    for num_frames in options.num_frames:
        for way in WAYS:
            shares = found.setdefault(str(num_frames), {})[way] = measured(engine, way, num_frames, options.num_clips)
            sys.stdout.write(f"| {num_frames} | {way} | {' | '.join(f'{value:.0%}' for value in shares.values())} |\n")
            sys.stdout.flush()
    if options.write is not None:
        write_json(options.write, found)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--num_frames", type=int, nargs="+", default=[33, 65], help="4k + 1 (33 65)")
    parser.add_argument("--num_clips", type=int, default=12, help="of combinations that training never saw (12)")
    parser.add_argument("--write", type=Path, metavar="JSON", help="also write the figures there")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
