"""Teach the toy by preferences that shapes are large, and measure whether it prefers them.

    python tools/toy/preferences.py outputs/preferences --write assets/toy/preferences.json

Both clips of a pair have one caption, place and motion; the chosen one shows a large shape, the rejected one a small
one. No caption says a word about size. The command makes the pairs, trains on them as configs/toy_preferences.yaml says
(a stopped training goes on), samples captions that no clip has, with the same noise before and after training, and
looks at the size of shapes, and whether they still are what the captions say.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import quality
import scene
import teach

from sgm.cli import run_command, tool_parser
from sgm.inference.video import write_video
from sgm.io import atomic_file, write_json

CHOSEN, REJECTED = 12.0, 8.0  # half of the extent of shapes, in pixels; those of the toy are between them
NUM_PAIRS, NUM_VALID = 32, 8
PARTS = {"train": NUM_PAIRS, "valid": NUM_VALID}
CONFIGS = (
    "configs/toy_lora.yaml",
    "configs/toy_sft.yaml",
    "configs/loss/preferences.yaml",
    "configs/toy_preferences.yaml",
)


def make(folder: Path) -> None:
    """Write the clips and a manifest of pairs for training and one for validation, deterministically."""
    rng = np.random.default_rng(0)
    clips = scene.random_clips(scene.combinations(held_out=False), rng)
    for part, num in PARTS.items():
        lines = []
        for number in range(num):
            clip = _with_room(next(clips))
            names = {}
            for kind, radius in (("video", CHOSEN), ("rejected", REJECTED)):
                frames = (scene.render(replace(clip, radius=radius)) * 255).round().astype(np.uint8)
                names[kind] = f"{kind}_{number:02d}.mp4"
                write_video(folder / part / names[kind], frames, scene.FPS, crf=10)
            lines.append(json.dumps({"caption": clip.caption, **names}) + "\n")
        with atomic_file(folder / part / "metadata.jsonl") as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def _with_room(clip: scene.Clip) -> scene.Clip:
    """Return a clip that starts where the larger shape stays inside the frame too."""
    low, high = CHOSEN + 2, scene.SIZE - CHOSEN - 2
    step = scene.DIRECTIONS[clip.direction]
    start = [
        float(np.clip(x, low - min(0, s) * clip.travel, high - max(0, s) * clip.travel))
        for x, s in zip(clip.start, step, strict=True)
    ]
    return replace(clip, start=(start[0], start[1]))


def area(video: np.ndarray) -> float:
    """Return the mean area of the shape in `video` (T, H, W, C) in [0, 1], in pixels."""
    return float((np.abs(video - scene.BACKGROUND).max(axis=-1) > 0.3).sum(axis=(1, 2)).mean())


def middle(clip: scene.Clip) -> float:
    """Return the area halfway between the chosen and the rejected size of the shape of a clip."""
    return float(np.mean([area(scene.render(replace(_with_room(clip), radius=size))) for size in (CHOSEN, REJECTED)]))


def shown(engine: Any, clips: list[scene.Clip], *, num_steps: int | None = None) -> dict[str, float]:
    """Return what samples of the captions of `clips` show: the share of large shapes, and of right ones."""
    videos = quality.sample(engine, clips, num_steps=num_steps)
    large = [area(video) > middle(clip) for video, clip in zip(videos, clips, strict=True)]
    found = quality.judge(videos, clips)
    sizes = [area(video) for video in videos]
    shares = {"large": float(np.mean(large)), "area": float(np.mean(sizes))}
    shares |= {name: getattr(found, name) for name in ("colour", "shape", "direction")}
    return {name: round(value, 4) for name, value in shares.items()}


def measured(run: Path, num_clips: int, *, num_steps: int | None = None) -> dict[str, Any]:
    """Return what samples show before and after the run in a folder of runs, and what its validation said."""
    clips = quality.held_out_clips(num_clips, seed=11)
    folder = max(run.glob("*/metrics.jsonl")).parent
    engines = {
        "before": quality.load_engine("configs/toy.yaml"),
        "after": quality.load_engine("configs/toy_lora.yaml", [f"args.load={folder}"]),
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "validation_accuracy" in row][-1]
    return {
        "clips": num_clips,
        **{name: shown(engine, clips, num_steps=num_steps) for name, engine in engines.items()},
        "validation": {name: round(last[f"validation_{name}"], 4) for name in ("accuracy", "margin")},
    }


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    pairs, runs = options.folder / "pairs", options.folder / "runs"
    make(pairs)
    folders = [f"args.{part}_data=[{pairs / part}]" for part in PARTS]
    teach.run_training("--base", *CONFIGS, *folders, f"args.save={runs}", "args.resume=auto")
    found = measured(runs, options.num_clips)
    names = list(found["before"])
    sys.stdout.write(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}\n")
    for when in ("before", "after"):
        shown_as = [format(value, ".0f" if name == "area" else ".0%") for name, value in found[when].items()]
        sys.stdout.write(f"| {when} | {' | '.join(shown_as)} |\n")
    accuracy, margin = (found["validation"][name] for name in ("accuracy", "margin"))
    sys.stdout.write(f"validation: accuracy {accuracy:.0%}, margin {margin:.2f}\n")
    if options.write is not None:
        write_json(options.write, found)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=Path, help="for pairs and runs")
    parser.add_argument("--num_clips", type=int, default=24, help="of combinations that training never saw (24)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
