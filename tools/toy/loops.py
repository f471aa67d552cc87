"""Measure with the toy how a loop closes: the step from its last frame to its first beside those between neighbours.

    python tools/toy/loops.py --write assets/toy/loops.json

Captions that training never saw are sampled with and without a loop. Steps are mean differences of pixels; the seam is
that from the last frame to the first, as a multiple of the mean of the others.
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

WAYS = {"without": False, "loop": True}


def seam(video: np.ndarray) -> float:
    """Return the step from the last frame of `video` (T, H, W, C) to its first, divided by the mean of the others."""
    steps = np.abs(np.roll(video, -1, axis=0) - video).mean(axis=(1, 2, 3))
    return float(steps[-1] / steps[:-1].mean())


def measured(engine: Any, way: str, num_clips: int, *, num_steps: int | None = None) -> dict[str, float]:
    """Return the mean seam, the shares of clips with the right colour and shape, and how far shapes move, in pixels."""
    clips, shape = quality.held_out_clips(num_clips, seed=7), quality.LATENT_SHAPE
    if WAYS[way]:  # the network takes one latent frame more, in front
        shape = (shape[0] - 1, *shape[1:])
    videos = quality.sample_together(engine, clips, shape=shape, loop=WAYS[way], num_steps=num_steps)
    shown = [scene.measure(video) for video in videos]
    found = {
        "seam": [seam(video) for video in videos],
        "colour": [one.colour == clip.colour for one, clip in zip(shown, clips, strict=True)],
        "shape": [one.shape == clip.shape for one, clip in zip(shown, clips, strict=True)],
        "moves": [np.ptp(from_video.centres(video), axis=0).max() for video in videos],
    }
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    engine = quality.load_engine("configs/toy.yaml")
    result: dict[str, Any] = {"clips": options.num_clips}
    for way in WAYS:
        found = result[way] = measured(engine, way, options.num_clips)
        sys.stdout.write(f"{way}: {', '.join(f'{name} {value:.2f}' for name, value in found.items())}\n")
        sys.stdout.flush()
    if options.write is not None:
        write_json(options.write, result)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--num_clips", type=int, default=12, help="of combinations that training never saw (12)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
