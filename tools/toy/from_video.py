"""Measure video to video with the toy: the colour of a clip is changed by the prompt, and its motion stays.

    python tools/toy/from_video.py --write assets/toy/from_video.json

Held-out clips are noised and denoised with a caption of another colour. A colour is right if it is that of the caption;
the motion stays if the centre of the shape is within 3 pixels of that in the clip, on average over the frames.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import quality
import scene
import torch

from sgm.cli import run_command, tool_parser
from sgm.io import write_json

NEAR = 3.0  # pixels
STRENGTHS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)


def other_colours(clips: Sequence[scene.Clip]) -> list[scene.Clip]:
    """Return the clips in other colours."""
    names = list(scene.COLOURS)
    return [
        replace(clip, colour=names[(names.index(clip.colour) + 1 + number % (len(names) - 1)) % len(names)])
        for number, clip in enumerate(clips)
    ]


def centres(video: np.ndarray) -> np.ndarray:
    """Return the centre (x, y) of the shape in each frame of `video` (T, H, W, C) in [0, 1], in pixels."""
    difference = np.abs(video - scene.BACKGROUND).max(axis=-1)
    weights, grid = difference * (difference > 0.3), np.arange(scene.SIZE) + 0.5
    total = np.maximum(weights.sum(axis=(1, 2)), 1e-6)
    return np.stack([weights.sum(axis=1) @ grid / total, weights.sum(axis=2) @ grid / total], axis=1)


def judged(
    videos: Sequence[np.ndarray], wanted: Sequence[scene.Clip], sources: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Return the shares of videos with the colour of the wanted clips, and with the motion of their sources."""
    colours = [scene.measure(video).colour == clip.colour for video, clip in zip(videos, wanted, strict=True)]
    apart = [np.abs(centres(video) - centres(clip)).mean() for video, clip in zip(videos, sources, strict=True)]
    return float(np.mean(colours)), float(np.mean([distance < NEAR for distance in apart]))


@torch.no_grad()
def shares(engine: Any, num_clips: int, strength: float, *, num_steps: int | None = None) -> tuple[float, float]:
    """Return the shares of clips with the right colour, and whose motion stays."""
    clips = quality.held_out_clips(num_clips, seed=7)
    wanted, sources = other_colours(clips), [scene.render(clip) for clip in clips]
    source = engine.encode_first_stage(torch.stack([quality.to_engine(video) for video in sources]), sample=False)
    videos = quality.sample_together(engine, wanted, source=source, strength=strength, num_steps=num_steps)
    return judged(videos, wanted, sources)


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    engine = quality.load_engine("configs/toy.yaml")
    result: dict[str, Any] = {"clips": options.num_clips}
    sys.stdout.write("| strength | colour of the prompt | motion of the clip |\n|---|---|---|\n")
    for strength in options.strength:
        colour, motion = shares(engine, options.num_clips, strength)
        result[f"{strength:g}"] = {"colour": round(colour, 4), "motion": round(motion, 4)}
        sys.stdout.write(f"| {strength:g} | {colour:.0%} | {motion:.0%} |\n")
        sys.stdout.flush()
    if options.write is not None:
        write_json(options.write, result)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--strength", type=float, nargs="+", default=STRENGTHS, help="one or several (0.2 to 1)")
    parser.add_argument("--num_clips", type=int, default=24, help="of combinations that training never saw (24)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
