"""Put the videos of finished sampling runs on one picture, a row each.

    python tools/contact_sheet.py outputs/toy outputs/toy_i2v --out outputs/demo.png

Use it for runs without ``args.contact_sheet``, for runs on several ranks, and to compare runs. Videos come in the
order of the folders, then of their prompts.
"""

import argparse
import json
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from sgm.inference.video import contact_sheet
from sgm.util import InputError, RunError


def results(folder: Path) -> list[tuple[str, np.ndarray]]:
    """Return caption and frames (T, H, W, 3) of every finished video below the folder of a run."""
    found = []
    for sidecar in sorted(folder.glob("*/*/000000.json"), key=_order):
        video = sidecar.with_suffix(".mp4")
        if video.is_file():
            content = json.loads(sidecar.read_text(encoding="utf-8"))
            start = " (from an image)" if content["image"] else ""
            found.append((f"{content['prompt']}{start}, seed {content['seed']}", iio.imread(video)))
    if not found:
        raise InputError(f"there is no finished video below {folder}; give the args.output_dir of a sampling run")
    return found


def _order(sidecar: Path) -> tuple[int, int]:
    prompt, k = sidecar.parent.parent.name.split("_")[0], sidecar.parent.name
    return int(prompt) if prompt.isdigit() else 0, int(k) if k.isdigit() else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of sampling runs")
    parser.add_argument("--out", required=True, type=Path, help="the PNG to write")
    parser.add_argument("--columns", type=int, default=5, help="frames shown of each video")
    options = parser.parse_args(argv)
    try:
        contact_sheet(
            [row for folder in options.folders for row in results(folder)], options.out, columns=options.columns
        )
    except (InputError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"contact sheet: {options.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
