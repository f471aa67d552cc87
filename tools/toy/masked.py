"""Train the toy on clips with a bar across their top, with masks that leave it out and without, and measure both.

    python tools/toy/masked.py outputs/toy_masks --write assets/toy/masked.json

All clips show a magenta bar over the upper quarter of the picture, and big shapes below it; no caption says a word
about either. The masks are black over the bar and 8 pixels below it. Both trainings begin with the toy's weights, and
differ in ``data.params.mask`` alone. The samples are of captions that no clip has: how much of the bar they show, which
is not to be learned, and how many show a big shape, which is, in the colour of the caption.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import quality
import report
import scene
import teach
import torch
from PIL import Image

from sgm.cli import run_command, tool_parser
from sgm.inference.video import write_video
from sgm.io import atomic_file, write_json

BAR, HIDDEN = 16, 24  # pixels from the top: of the bar, and of what the masks leave out
COLOUR = "magenta"
NEAR = 0.5  # distance of colours
CONFIGS = ("configs/toy_lora.yaml", "configs/toy_sft.yaml", "configs/toy_masked.yaml")


def clips(num: int, *, held_out: bool, seed: int) -> list[scene.Clip]:
    """Return clips without a size, of combinations that move to a side and are of another colour than the bar."""
    found = [n for n in scene.combinations(held_out=held_out) if n[0] != COLOUR and n[2] in ("left", "right")]
    drawn = scene.random_clips(found, np.random.default_rng(seed))
    return [next(drawn) for _ in range(num)]


def big(clip: scene.Clip) -> scene.Clip:
    """Return a clip with a shape of the size that "big" means, below what the masks leave out."""
    radius = clip.radius / scene.RADII[None] * scene.RADII["big"]
    return replace(clip, radius=radius, start=(clip.start[0], (HIDDEN + scene.SIZE) / 2))


def with_bar(video: np.ndarray) -> np.ndarray:
    """Return `video` (T, H, W, C) in [0, 1] with the bar across its top."""
    video = video.copy()
    video[:, :BAR] = scene.COLOURS[COLOUR]
    return video


def make(folder: Path, num_clips: int) -> None:
    """Write ``videos/``, ``labels/`` and ``mask/`` into `folder`, deterministically."""
    mask = np.full((scene.SIZE, scene.SIZE), 255, np.uint8)
    mask[:HIDDEN] = 0
    for number, clip in enumerate(clips(num_clips, held_out=False, seed=6)):
        frames = (with_bar(scene.render(big(clip))) * 255).round().astype(np.uint8)
        write_video(folder / "videos" / f"{number:03d}.mp4", frames, scene.FPS, crf=10)
        with atomic_file(folder / "labels" / f"{number:03d}.txt") as temporary:
            temporary.write_text(f"{clip.caption}\n", encoding="utf-8")
        with atomic_file(folder / "mask" / f"{number:03d}.png") as temporary:
            Image.fromarray(mask).save(temporary)


def like(video: np.ndarray, colour: str) -> np.ndarray:
    """Return the pixels of `video` (T, H, W, C) in [0, 1] that have about a colour: bool (T, H, W)."""
    return np.linalg.norm(video - np.asarray(scene.COLOURS[colour]), axis=-1) < NEAR


def area(video: np.ndarray, clip: scene.Clip) -> float:
    """Return the mean area in `video` of the colour of a clip, in pixels."""
    return float(like(video, clip.colour).sum(axis=(1, 2)).mean())


def is_big(video: np.ndarray, clip: scene.Clip) -> bool:
    """Whether the shape in `video` is nearer to the size of the clips of the training than to that of its caption."""
    return area(video, clip) > float(np.mean([area(scene.render(each), clip) for each in (clip, big(clip))]))


def most_beside_the_bar(video: np.ndarray) -> str:
    """Return the colour that most pixels of `video` have, of all but that of the bar."""
    return max((name for name in scene.COLOURS if name != COLOUR), key=lambda name: like(video, name).sum())


def shown(videos: list[np.ndarray], wanted: list[scene.Clip]) -> dict[str, float]:
    """Return the share of the bar's pixels in samples, and the shares of samples with a big shape and the colour."""
    bar = [like(video, COLOUR)[:, :BAR].mean() for video in videos]
    large = [is_big(video, clip) for video, clip in zip(videos, wanted, strict=True)]
    colours = [most_beside_the_bar(video) == clip.colour for video, clip in zip(videos, wanted, strict=True)]
    found = {"bar": np.mean(bar), "big": np.mean(large), "colour": np.mean(colours)}
    return {name: round(float(value), 4) for name, value in found.items()}


@torch.no_grad()
def measured(engine: Any, num_clips: int, *, num_steps: int | None = None) -> dict[str, float]:
    """Return what samples of captions show that no clip has."""
    wanted = clips(num_clips, held_out=True, seed=7)
    return shown(quality.sample(engine, wanted, num_steps=num_steps), wanted)


def trained(folder: Path, name: str, steps: int, *, mask: bool) -> Path:
    """Train with or without masks; return the run folder."""
    own = (f"data.params.mask={str(mask).lower()}", "deepspeed.optimizer.params.lr=4e-3")
    return teach.trained(folder, name, steps, "--base", *CONFIGS, teach.TARGETS, *own)


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    folder: Path = options.folder
    make(folder / "clips", options.num_train)
    found: dict[str, Any] = {"clips": options.num_clips, "steps": options.steps}
    for name in ("base", "without", "with"):
        config, words = "configs/toy.yaml", []
        if name != "base":
            run = trained(folder, name, options.steps, mask=name == "with")
            config, words = "configs/toy_lora.yaml", [teach.TARGETS, f"args.load={run}"]
        found[name] = measured(quality.load_engine(config, words), options.num_clips, num_steps=options.num_steps)
        report.say(name, found[name])
    if options.write is not None:
        write_json(options.write, found)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=Path, help="for clips, cache and weights")
    parser.add_argument("--num_train", type=int, default=24, help="clips to train on (24)")
    parser.add_argument("--steps", type=int, default=100, help="of each training, 8 clips each (100)")
    parser.add_argument("--num_clips", type=int, default=12, help="samples to measure (12)")
    parser.add_argument("--num_steps", type=int, help="of sampling (those of the toy)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
