"""Measure the LoRA of ``make demo``: with strengths and schedules, and extracted again from a full model.

    python tools/toy/adapters.py outputs/toy_adapters --write assets/toy/adapters.json

``strengths`` samples the shipped LoRA with each strength or schedule. ``extracted`` merges it into its base, extracts
LoRAs of several ranks from the two full models, and samples those. All samples are of the demo's prompts: `land` is its
share of the ground where it was asked for, and `unasked` where it was not. Either part can be measured alone with
``--parts``; the other stays in the file.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import concept

from sgm.cli import run_command, tool_parser
from sgm.conversion.lora_extract import extract_lora
from sgm.conversion.lora_merge import merge_loras
from sgm.inference.main import main as sample_video
from sgm.io import write_json
from sgm.util import RunError

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


def sampled(folder: Path, **lora: Any) -> dict[str, float]:
    """Sample the demo's prompts with the entry of ``args.loras``, into `folder`; return what they show."""
    shutil.rmtree(folder, ignore_errors=True)
    words = [f"args.loras.0.{name}={value}" for name, value in lora.items()]
    if code := sample_video([*SAMPLE, *words, f"args.output_dir={folder}", "args.contact_sheet=false"]):
        raise RunError(f"sampling ended with the exit code {code}")
    found = concept.measure(folder)
    return {name: round(getattr(found, name), 4) for name in ("land", "unasked", "colour", "shape")}


def strengths(folder: Path) -> dict[str, Any]:
    """Measure the shipped LoRA."""
    return {name: sampled(folder / f"{number}", **given) for number, (name, given) in enumerate(STRENGTHS.items())}


def extracted(folder: Path) -> dict[str, Any]:
    """Measure LoRAs that are extracted from the base and the base with the shipped LoRA merged into it."""
    shutil.rmtree(folder, ignore_errors=True)
    merge_loras([concept.LORA], folder / "merged", base=BASE)
    result = {}
    for rank in RANKS:
        found = extract_lora(BASE, folder / "merged", folder / f"rank_{rank}", rank=rank, targets=TARGETS)
        shares = sampled(folder / "samples", path=folder / f"rank_{rank}")
        result[f"{rank}"] = {"held": round(found.captured, 4), **shares}
    return result


MEASURES = {"strengths": strengths, "extracted": extracted}


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
