"""Teach the toy from clips with a logo that is masked, and without the mask, and measure what it has learned.

    python tools/toy/masked.py make outputs/masked/clips
    python tools/toy/masked.py measure outputs/masked --write assets/toy/masked.json

All clips show big shapes, which no caption says, and a white square in a corner; the mask is black there. ``measure``
makes clips, trains a LoRA twice, and samples captions of combinations that training never saw, with the same noise: how
many samples show the logo, and how many big shapes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import quality
import scene
from PIL import Image

from sgm.cli import run_command, tool_parser
from sgm.inference.video import write_video
from sgm.io import atomic_file, write_json
from sgm.training.main import main as train
from sgm.util import RunError

LOGO = 16  # pixels of its side, two latents
CONFIGS = ("configs/toy_lora.yaml", "configs/toy_sft.yaml", "configs/toy_masked.yaml")
NUM_CLIPS = 60


def make(folder: Path) -> None:
    """Write ``videos/``, ``mask/`` and ``labels/`` into `folder`, deterministically."""
    clips = scene.random_clips(scene.combinations(held_out=False), np.random.default_rng(13), ("big",))
    mask = np.full((scene.SIZE, scene.SIZE), 255, np.uint8)
    mask[:LOGO, :LOGO] = 0
    for number in range(NUM_CLIPS):
        clip = next(clips)
        video = scene.render(clip)
        video[:, :LOGO, :LOGO] = 1.0
        frames = (video * 255).round().astype(np.uint8)
        write_video(folder / "videos" / f"{number:02d}.mp4", frames, scene.FPS, crf=10)
        with atomic_file(folder / "mask" / f"{number:02d}.png") as temporary:
            Image.fromarray(mask).save(temporary)
        with atomic_file(folder / "labels" / f"{number:02d}.txt") as temporary:
            temporary.write_text(f"{scene.caption(clip.colour, clip.shape, clip.direction)}\n", encoding="utf-8")


def has_logo(video: np.ndarray) -> bool:
    """Whether `video` (T, H, W, C) in [0, 1] is nearly white in the corner of the logo, on average over the frames."""
    return bool(video[:, :LOGO, :LOGO].mean() > 0.7)


def is_big(video: np.ndarray, clip: scene.Clip) -> bool:
    """Whether the shape of `video` covers, beside the corner, more than halfway from a usual to a big one."""
    usual, big = (
        _area(
            scene.render(scene.random_clip((clip.colour, clip.shape, clip.direction), np.random.default_rng(1), size))
        )
        for size in (None, "big")
    )
    return _area(video) > (usual + big) / 2


def _area(video: np.ndarray) -> float:
    differs = np.abs(video - scene.BACKGROUND).max(axis=-1) > 0.3
    differs[:, :LOGO, :LOGO] = False
    return float(differs.sum(axis=(1, 2)).mean())


def shown(engine: Any, num_clips: int, *, num_steps: int | None = None) -> dict[str, float]:
    """Return the shares of samples with the logo, and with big shapes, of captions that say no size."""
    rng, names = np.random.default_rng(17), scene.combinations(held_out=True)
    clips = [scene.random_clip(names[number % len(names)], rng) for number in range(num_clips)]
    videos = quality.sample(engine, clips, num_steps=num_steps)
    pairs = list(zip(videos, clips, strict=True))
    found = {"logo": [has_logo(video) for video in videos], "big": [is_big(video, clip) for video, clip in pairs]}
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def measure(options: argparse.Namespace) -> None:
    """Train twice on clips in a folder, and write the figures."""
    folder: Path = options.folder
    make(folder / "clips")
    found: dict[str, Any] = {"clips": options.num_clips, "steps": options.steps}
    for name, masked in (("without", "false"), ("with", "true")):
        settings = {
            "args.train_data": f"[{folder / 'clips'}]",
            "args.train_iters": options.steps,
            "args.save_interval": options.steps,
            "args.precompute": "true",
            "args.resume": "none",
            "args.save": folder,
            "args.experiment_name": name,
            "data.params.mask": masked,
        }
        code = train(["--base", *CONFIGS, *(f"{key}={value}" for key, value in settings.items())])
        if code:
            raise RunError(f"training ended with the exit code {code}")
        run = max(folder.glob(f"{name}-*"))
        found[name] = shown(
            quality.load_engine("configs/toy_lora.yaml", [f"args.load={run}"]),
            options.num_clips,
            num_steps=options.num_steps,
        )
    found["before"] = shown(quality.load_engine("configs/toy.yaml"), options.num_clips, num_steps=options.num_steps)
    for name in ("before", "without", "with"):
        sys.stdout.write(f"{name}: {', '.join(f'{key} {value:.2f}' for key, value in found[name].items())}\n")
    if options.write is not None:
        write_json(options.write, found)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the clips")
    making.add_argument("folder", type=Path)
    making.set_defaults(work=lambda options: make(options.folder))
    measuring = commands.add_parser("measure", help="make clips, train with and without masks, and sample")
    measuring.add_argument("folder", type=Path, help="for clips, caches and weights")
    measuring.add_argument("--steps", type=int, default=150, help="of training, 4 clips each (150)")
    measuring.add_argument("--num_clips", type=int, default=24, help="captions to measure with (24)")
    measuring.add_argument("--num_steps", type=int, help="of sampling (those of the toy)")
    measuring.add_argument("--write", type=Path, help="a JSON file for the figures")
    measuring.set_defaults(work=measure)
    options = parser.parse_args(argv)
    return run_command(options.work, options)


if __name__ == "__main__":
    sys.exit(main())
