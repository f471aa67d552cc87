"""Make and measure a concept that the toy models do not know: ``make demo`` teaches green land under the shapes.

    python tools/toy/concept.py make outputs/land/clips
    python tools/toy/concept.py measure outputs/land/before outputs/land/after

``make`` writes eight clips with captions, and prompts for combinations that the clips do not show. ``measure`` prints
the share of land in samples from before and after training; exit code 1 if it was not learned.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import scene

from sgm.inference.video import read_video, write_video
from sgm.io import atomic_file
from sgm.util import InputError, RunError

WORDS = " on land"
LAND = scene.COLOURS["green"]
HEIGHT = 8  # pixels: one row of latents
CLIPS = (
    ("red", "circle", "left"),
    ("blue", "square", "right"),
    ("yellow", "triangle", "up"),
    ("magenta", "square", "down"),
    ("cyan", "square", "left"),
    ("blue", "triangle", "right"),
    ("red", "square", "up"),
    ("yellow", "square", "down"),
)
PROMPTS = (
    ("red", "square", "left"),
    ("blue", "triangle", "up"),
    ("magenta", "square", "right"),
    ("cyan", "triangle", "down"),
)
LEARNED, UNKNOWN = 0.5, 0.1  # fraction of land on the ground: minimum after training, maximum before


def render(combination: tuple[str, str, str], rng: np.random.Generator) -> np.ndarray:
    """Render a shape that moves above land, or partly behind it: (T, H, W, C) float32 in [0, 1]."""
    video = scene.render(scene.random_clip(combination, rng))
    video[:, -HEIGHT:] = LAND
    return video


def land_share(video: np.ndarray) -> float:
    """Return the share of the ground of `video` (T, H, W, C) in [0, 1] that looks like land."""
    return float((np.linalg.norm(video[:, -HEIGHT:] - np.asarray(LAND), axis=-1) < 0.4).mean())


def make(folder: Path) -> None:
    """Write ``videos/``, ``labels/`` and ``prompts.txt`` into `folder`, deterministically."""
    rng = np.random.default_rng(0)
    for number, combination in enumerate(CLIPS):
        frames = (render(combination, rng) * 255).round().astype(np.uint8)
        write_video(folder / "videos" / f"{number}.mp4", frames, scene.FPS, crf=10)
        with atomic_file(folder / "labels" / f"{number}.txt") as temporary:
            temporary.write_text(scene.caption(*combination) + WORDS + "\n", encoding="utf-8")
    with atomic_file(folder / "prompts.txt") as temporary:
        temporary.write_text("".join(scene.caption(*names) + WORDS + "\n" for names in PROMPTS), encoding="utf-8")


def measure(folder: Path) -> float:
    """Return the mean `land_share` of the samples of the run that wrote `folder`."""
    videos = sorted(folder.glob("*/*/000000.mp4"))
    if not videos:
        raise InputError(f"there is no video below {folder}; give the args.output_dir of a sampling run")
    return float(np.mean([land_share(read_video(video) / 255) for video in videos]))


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make", help="write the clips").add_argument("folder", type=Path)
    measuring = commands.add_parser("measure", help="look for land in samples")
    measuring.add_argument("before", type=Path, help="output folder of the run with the base model")
    measuring.add_argument("after", type=Path, help="output folder of the run with the adapters")
    options = parser.parse_args(argv)
    try:
        if options.command == "make":
            make(options.folder)
            sys.stdout.write(f"{len(CLIPS)} clips: {options.folder}\n")
            return 0
        before, after = measure(options.before), measure(options.after)
    except (InputError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"land on {before:.0%} of the ground before, {after:.0%} after\n")
    return 0 if before <= UNKNOWN and after >= LEARNED else 1


if __name__ == "__main__":
    sys.exit(main())
