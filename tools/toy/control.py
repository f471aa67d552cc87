"""Teach the toy to follow outlines, and measure it: colour by the prompt, place, size and motion by the control.

    python tools/toy/control.py outputs/toy_control --write assets/toy/control.json

Makes clips of the training combinations with their outlines, trains on them, and samples outlines of clips that
training never saw, each with a caption of another colour. A sample follows its control if, on average over the frames,
the pixels of its shape and those of the clip overlap by half or more of their union. The base, which is not shown the
outlines, is measured beside it.
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
import teach
import torch

from sgm.cli import run_command, tool_parser
from sgm.inference.video import write_video
from sgm.io import atomic_file, write_json

OVERLAP = 0.5
CONFIGS = ("configs/toy_sft.yaml", "configs/control/video.yaml")


def outlines(video: np.ndarray) -> np.ndarray:
    """Return the edges of `video` (T, H, W, C) in [0, 1], white on black: what differs from a neighbouring pixel."""
    grey = video.mean(axis=-1)
    edges = np.zeros_like(grey)
    for axis in (1, 2):
        step = np.abs(np.diff(grey, axis=axis)) > 0.05
        first, second = ((slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None)))
        edges[first] = np.maximum(edges[first], step)
        edges[second] = np.maximum(edges[second], step)
    return np.repeat(edges[..., None], 3, axis=-1).astype(np.float32)


def make(folder: Path, num_clips: int) -> None:
    """Write ``videos/``, ``control/`` and ``labels/`` into `folder`, deterministically."""
    combinations, sizes = scene.combinations(held_out=False), tuple(scene.RADII)
    clips = scene.random_clips(combinations, np.random.default_rng(5), sizes)
    for number in range(num_clips):
        clip = next(clips)
        video = scene.render(clip)
        for kind, frames in (("videos", video), ("control", outlines(video))):
            path = folder / kind / f"{number:03d}.mp4"
            write_video(path, (frames * 255).round().astype(np.uint8), scene.FPS, crf=10)
        with atomic_file(folder / "labels" / f"{number:03d}.txt") as temporary:
            temporary.write_text(f"{clip.caption}\n", encoding="utf-8")


def overlap(video: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean over the frames of intersection over union of the shapes in two videos (T, H, W, C)."""
    own, other = (np.abs(each - scene.BACKGROUND).max(axis=-1) > 0.3 for each in (video, wanted))
    return float(((own & other).sum(axis=(1, 2)) / np.maximum((own | other).sum(axis=(1, 2)), 1)).mean())


@torch.no_grad()
def shares(engine: Any, num_clips: int, *, num_steps: int | None = None) -> dict[str, float]:
    """Return the shares of samples with the right colour and that follow their control, and the mean overlap."""
    clips = quality.held_out_clips(num_clips, seed=7)
    sources, wanted = [scene.render(clip) for clip in clips], from_video.other_colours(clips)
    control = None
    if engine.network.control_channels:
        shown = torch.stack([quality.to_engine(outlines(video)) for video in sources])
        control = engine.encode_first_stage(shown, sample=False)
    videos = quality.sample_together(engine, wanted, control=control, num_steps=num_steps)
    overlaps = [overlap(video, source) for video, source in zip(videos, sources, strict=True)]
    colours = [scene.measure(video).colour == clip.colour for video, clip in zip(videos, wanted, strict=True)]
    return {
        "colour": round(float(np.mean(colours)), 4),
        "follows": round(float(np.mean([each >= OVERLAP for each in overlaps])), 4),
        "mean_overlap": round(float(np.mean(overlaps)), 4),
    }


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    folder: Path = options.folder
    make(folder / "clips", options.num_train)
    words = ("--base", f"configs/toy{'_lora' * options.lora}.yaml", *CONFIGS)
    run = teach.trained(folder, "run", options.steps, *words, eval_interval="null", split='"1,0,0"')
    found: dict[str, Any] = {"clips": options.num_clips, "steps": options.steps}
    trained = (f"args.load={run}", "model.network_config.params.control_channels=16")
    for name, config, overrides in (("base", "configs/toy.yaml", ()), ("control", words[1], trained)):
        found[name] = shares(quality.load_engine(config, overrides), options.num_clips, num_steps=options.num_steps)
        report.say(name, found[name])
    if options.write is not None:
        write_json(options.write, found)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=Path, help="for clips, cache and weights")
    parser.add_argument("--num_train", type=int, default=192, help="clips to train on (192)")
    parser.add_argument("--steps", type=int, default=800, help="of training, 8 clips each (800)")
    parser.add_argument("--lora", action="store_true", help="train adapters and the columns of the control only")
    parser.add_argument("--num_clips", type=int, default=24, help="clips to measure with (24)")
    parser.add_argument("--num_steps", type=int, help="of sampling (those of the toy)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
