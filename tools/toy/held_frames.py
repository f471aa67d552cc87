"""Measure with the toy how a clip is continued, and how the way from a first to a last picture is found.

    python tools/toy/held_frames.py --write assets/toy/held_frames.json

Of clips that training never saw, the first 9 of 17 frames, or the first and the last one, are held; the caption is that
of the clip. What is sampled is compared with where the clip itself goes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import from_video
import numpy as np
import quality
import report
import scene
import torch

from sgm.cli import run_command, tool_parser
from sgm.io import write_json

NUM_HELD = 9
NEAR = 2.0  # pixels
FAST = 1.25  # a speed is kept if it is up to so many times faster or slower
STILL = 4  # frames at the end that show a last picture


def continuation(engine: Any, num_clips: int, *, num_steps: int | None = None) -> dict[str, float]:
    """Return the shares of clips that keep their colour, motion and speed in the new frames, and their mean speed.

    The motion is kept if the centre of the shape is within 2 pixels of where the motion of the clip leads, on average
    over the new frames. The speed is relative to that of the clip, and kept if it is within a quarter of that.
    """
    clips = quality.held_out_clips(num_clips, seed=7)
    whole = [scene.render(clip) for clip in clips]
    held = torch.stack([quality.to_engine(video[:NUM_HELD]) for video in whole])
    start = engine.encode_first_stage(held, sample=False)
    new = [video[NUM_HELD:] for video in quality.sample_together(engine, clips, num_steps=num_steps, start=start)]
    paths = [
        (from_video.centres(video), from_video.centres(clip[NUM_HELD:])) for video, clip in zip(new, whole, strict=True)
    ]
    pairs = list(zip(new, clips, strict=True))
    speeds = [np.ptp(path, axis=0).max() / np.ptp(wanted, axis=0).max() for path, wanted in paths]
    return {
        "colour": float(np.mean([scene.measure(video).colour == clip.colour for video, clip in pairs])),
        "motion": float(np.mean([np.abs(path - wanted).mean() < NEAR for path, wanted in paths])),
        "speed": float(np.mean([1 / FAST <= speed <= FAST for speed in speeds])),
        "mean_speed": float(np.mean(speeds)),
    }


def first_and_last(engine: Any, num_clips: int, *, num_steps: int | None = None) -> dict[str, float]:
    """Return the shares of clips with the right colour, that begin and end as they should, and whose motion is even.

    The ends are right if the centre of the shape is within 2 pixels of that in the pictures. The motion is even if it
    is within 3 pixels of a straight way between them at an even speed, on average over the frames in between.
    """
    clips = quality.held_out_clips(num_clips, seed=7)
    whole = [scene.render(clip) for clip in clips]
    first, last = (torch.stack([quality.to_engine(video)[place] for video in whole])[:, None] for place in (0, -1))
    start = engine.encode_first_stage(first, sample=False)
    end = engine.encode_first_stage(last.expand(-1, STILL + 1, -1, -1, -1), sample=False)[:, 1:]
    videos = quality.sample_together(engine, clips, num_steps=num_steps, start=start, end=end)
    colours, ends, even = [], [], []
    for video, clip, given in zip(videos, clips, whole, strict=True):
        path, wanted = from_video.centres(video), from_video.centres(given)
        straight = np.linspace(wanted[0], wanted[-1], len(path) - STILL + 1)
        colours.append(scene.measure(video).colour == clip.colour)
        ends.append(max(np.abs(path[place] - wanted[place]).max() for place in (0, -1)) < NEAR)
        even.append(np.abs(path[1:-STILL] - straight[1:-1]).mean() < from_video.NEAR)
    return {name: float(np.mean(found)) for name, found in (("colour", colours), ("ends", ends), ("motion", even))}


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    engine, num = quality.load_engine("configs/toy.yaml"), options.num_clips
    found = {"clips": num}
    for name, judge in (("continuation", continuation), ("first_and_last", first_and_last)):
        found[name] = {key: round(value, 4) for key, value in judge(engine, num).items()}
        report.say(name, found[name])
    if options.write is not None:
        write_json(options.write, found)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--num_clips", type=int, default=24, help="of combinations that training never saw (24)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
