"""Measure adapters of the toy: strengths, extraction, several at once, other kinds, and averages of checkpoints.

    python tools/toy/adapters.py outputs/toy_adapters --write assets/toy/adapters.json

``strengths`` samples the LoRA of ``make demo`` with each strength or schedule. ``extracted`` merges it into its base,
extracts LoRAs of several ranks from the two full models, and samples those. ``kinds`` trains the land of the demo with
each kind of adapters, exports them, and samples the exported files. ``soups`` averages the last checkpoints of the
rsLoRA among them. ``several`` trains another LoRA, of big shapes, and samples both, each alone, and both at once.

All samples are of the demo's prompts: `land` is its share of the ground where it was asked for, and `unasked` where it
was not. Each part can be measured alone with ``--parts``; the others stay in the file. Stopped trainings go on.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import concept
import masked
import numpy as np
import scene
import teach

from sgm.cli import run_command, tool_parser
from sgm.conversion.lora import Style, export_lora
from sgm.conversion.lora_extract import extract_lora
from sgm.conversion.lora_merge import average_loras, average_weights, merge_loras
from sgm.inference.main import main as sample_video
from sgm.inference.video import read_video
from sgm.io import write_json
from sgm.util import RunError
from sgm.weights.files import find_weights, read_tensors

BASE = "assets/toy/transformer"
SAMPLE = ("--base", "configs/toy.yaml", "configs/toy_inference.yaml", "configs/toy_loras.yaml")
STRENGTHS: dict[str, dict[str, str]] = {
    **{value: {"strength": value} for value in ("0", "0.5", "0.75", "1")},
    "first half": {"schedule": "[[0.5, 1], [0.5, 0]]"},
    "second half": {"schedule": "[[0.5, 0], [0.5, 1]]"},
    **{value: {"strength": value} for value in ("{0-2: 1, 3-5: 0, embeddings: 1}", "{0-2: 0, 3-5: 1, embeddings: 1}")},
}
RANKS = (16, 8, 4)
TARGETS = ("attention", "ff", "patch", "text")  # of the shipped LoRA

TRAIN = ("--base", "configs/toy_lora.yaml", "configs/toy_sft.yaml", "configs/toy_land.yaml")
# Name of a run → the words after `TRAIN`; and the style of the exported file, since diffusers loads no LoKr.
KINDS: dict[str, tuple[str, ...]] = {
    "rslora": ("configs/lora/everything.yaml",),
    "dora": ("configs/lora/dora.yaml",),
    "lokr": ("configs/lora/lokr.yaml",),
    "lokr_root": ("configs/lora/lokr.yaml", "model.network_config.params.modules.lora_config.params.factor=-1"),
}
STYLES: dict[str, Style] = {"rslora": "diffusers", "dora": "diffusers", "lokr": "kohya", "lokr_root": "comfyui"}
STEPS, INTERVAL, DECAY = 300, 50, 0.5  # of the trainings, between their checkpoints; of the moving average of those
BIG_STEPS = 100  # of the LoRA of big shapes


def sampled(folder: Path, *words: str) -> dict[str, float]:
    """Sample the demo's prompts with words for ``args.loras``, into `folder`; return what they show."""
    shutil.rmtree(folder, ignore_errors=True)
    if code := sample_video([*SAMPLE, *words, f"args.output_dir={folder}", "args.contact_sheet=false"]):
        raise RunError(f"sampling ended with the exit code {code}")
    found = concept.measure(folder)
    return {name: round(getattr(found, name), 4) for name in ("land", "unasked", "colour", "shape")}


def strengths(folder: Path) -> dict[str, Any]:
    """Measure the shipped LoRA."""
    return {
        name: sampled(folder / f"{number}", *(f"args.loras.0.{key}={value}" for key, value in given.items()))
        for number, (name, given) in enumerate(STRENGTHS.items())
    }


def extracted(folder: Path) -> dict[str, Any]:
    """Measure LoRAs that are extracted from the base and the base with the shipped LoRA merged into it."""
    shutil.rmtree(folder, ignore_errors=True)
    merge_loras([concept.LORA], folder / "merged", base=BASE)
    result = {}
    for rank in RANKS:
        found = extract_lora(BASE, folder / "merged", folder / f"rank_{rank}", rank=rank, targets=TARGETS)
        shares = sampled(folder / "samples", f"args.loras.0.path={folder / f'rank_{rank}'}")
        result[f"{rank}"] = {"held": round(found.captured, 4), **shares}
    return result


def trained(folder: Path, name: str) -> Path:
    """Train the land of the demo with adapters of a kind, or go on, below `folder`; return the run folder."""
    concept.make(folder / "clips")
    words = (f"args.train_data=[{folder / 'clips'}]", f"args.save={folder / 'runs'}", f"args.experiment_name={name}")
    steps = (f"args.train_iters={STEPS}", f"args.save_interval={INTERVAL}", "args.resume=auto")
    teach.run_training(*TRAIN, *KINDS[name], *words, *steps)
    return max((folder / "runs").glob(f"{name}-*"))


def kinds(folder: Path) -> dict[str, Any]:
    """Measure adapters of other kinds, from the files that they are exported as."""
    result = {}
    for name, style in STYLES.items():
        run, exported = trained(folder, name), folder / "exported" / name
        shutil.rmtree(exported, ignore_errors=True)
        file = export_lora(run, exported, style=style)
        numbers = sum(math.prod(tensor.shape) for tensor in read_tensors(find_weights(run)).values())
        shares = sampled(folder / "samples" / name, f"args.loras.0.path={file}")
        result[name] = {"numbers": numbers, "style": style, **shares}
    return result


def soups(folder: Path) -> dict[str, Any]:
    """Measure the last checkpoints of the rsLoRA, their average, and their moving average."""
    run, iterations = trained(folder.parent / "kinds", "rslora"), range(STEPS - 2 * INTERVAL, STEPS + 1, INTERVAL)
    shutil.rmtree(folder, ignore_errors=True)
    paths = {f"{iteration}": run / f"{iteration}" for iteration in iterations}
    last = list(paths.values())
    for name, weights in (("average", [1.0]), ("moving average", average_weights(DECAY, len(last)))):
        paths[name] = average_loras(last, folder / name.replace(" ", "_"), strengths=weights)
    return {name: sampled(folder / "samples" / name, f"args.loras.0.path={path}") for name, path in paths.items()}


def several(folder: Path) -> dict[str, Any]:
    """Measure the shipped LoRA and one of big shapes, each alone, and both at once."""
    masked.make(folder / "clips", 24)
    big = masked.trained(folder, "big", BIG_STEPS, mask=True)
    both, result = {"land": concept.LORA, "big": big}, {}
    for name, chosen in (("land", ["land"]), ("big", ["big"]), ("both", [*both])):
        entries = ", ".join(f"{{path: {both[each]}}}" for each in chosen)
        shares = sampled(folder / "samples" / name, f"args.loras=[{entries}]")
        result[name] = shares | {"big": round(big_share(folder / "samples" / name), 4)}
    return result


def big_share(folder: Path) -> float:
    """Return the share of the samples of a run whose shape is big."""
    videos = [read_video(path) / 255 for path in sorted(folder.glob("*/*/000000.mp4"))]
    return float(np.mean([scene.measure(concept.above(video)).size == "big" for video in videos]))


MEASURES = {"strengths": strengths, "extracted": extracted, "kinds": kinds, "soups": soups, "several": several}


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    found: dict[str, Any] = {}
    if options.write is not None and options.write.is_file():
        found = json.loads(options.write.read_text(encoding="utf-8"))
    for part in options.parts:
        found[part] = MEASURES[part](options.folder / part)
        sys.stdout.write(f"{part}: {json.dumps(found[part])}\n")
        sys.stdout.flush()
        if options.write is not None:
            write_json(options.write, {name: found[name] for name in MEASURES if name in found})


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("folder", type=Path, help="for weights and samples")
    parser.add_argument("--parts", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure (all)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
