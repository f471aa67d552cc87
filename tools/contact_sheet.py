"""Draw the videos of finished sampling runs on one picture, a row each.

    python tools/contact_sheet.py outputs/toy outputs/toy_i2v --out outputs/demo.png
    python tools/contact_sheet.py outputs/land/before outputs/land/after --beside --out outputs/demo_lora.png
    python tools/contact_sheet.py outputs/toy --out outputs/demo.webp --columns 3

Use it for runs without ``args.contact_sheet`` or on several ranks, and to compare runs. Videos are sorted by folder and
prompt; with ``--beside``, runs of the same prompts share a row for each prompt. A name that ends with .webp or .gif
gives a moving picture, in which all videos play, ``--columns`` in a row.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sgm.cli import run_command, tool_parser
from sgm.inference.results import finished_videos
from sgm.inference.video import animation, contact_sheet
from sgm.util import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".webp", ".gif")


def below(folders: Sequence[Path]) -> list[tuple[str, np.ndarray]]:
    """Return the videos of all runs, one run after the other."""
    return [sample for folder in folders for sample in finished_videos(folder)]


def same_samples(folders: Sequence[Path]) -> list[list[tuple[str, np.ndarray]]]:
    """Return the videos of each run, which are of the same prompts and seeds in all of them.

    Raises:
        InputError: they are not.
    """
    runs = [finished_videos(folder) for folder in folders]
    if any([caption for caption, _ in run] != [caption for caption, _ in runs[0]] for run in runs):
        raise InputError(_differ(folders))
    return runs


def alternating(folders: Sequence[Path]) -> list[tuple[str, np.ndarray]]:
    """Return the videos of all runs, those of a prompt after each other, with the run in their captions."""
    return [
        (f"{folder.name}: {caption}", video)
        for samples in zip(*same_samples(folders), strict=True)
        for folder, (caption, video) in zip(folders, samples, strict=True)
    ]


def beside(folders: Sequence[Path], columns: int) -> list[tuple[str, np.ndarray]]:
    """Return a row for each prompt of all runs: `columns` frames from every run, in the order of `folders`."""
    rows = []
    for samples in zip(*same_samples(folders), strict=True):
        captions, videos = zip(*samples, strict=True)
        if len({video.shape[1:] for video in videos}) > 1:
            raise InputError(_differ(folders))
        chosen = [video[np.linspace(0, len(video) - 1, columns).round().astype(int)] for video in videos]
        gap = np.full_like(chosen[0][:1], 255)
        parts = [part for frames in chosen for part in (gap, frames)][1:]
        names = " | ".join(folder.name for folder in folders)
        rows.append((f"{names}: {captions[0]}", np.concatenate(parts)))
    return rows


def _differ(folders: Sequence[Path]) -> str:
    listed = ", ".join(map(str, folders))
    return f"{listed}: prompts, seeds or sizes differ; --beside compares runs that differ in weights"


def work(options: argparse.Namespace) -> None:
    """Draw the videos of all runs."""
    columns = options.columns
    if columns < 1 or not 0.1 <= options.fps <= 100:
        raise InputError(f"--columns is {columns} and --fps {options.fps:g}; give at least 1, and 0.1 to 100")
    if options.out.suffix.lower() not in SUFFIXES or options.out.is_dir():
        raise InputError(f"--out {options.out}: name a file that ends in {', '.join(SUFFIXES)}")
    if options.out.suffix.lower() in (".webp", ".gif"):
        videos = alternating(options.folders) if options.beside else below(options.folders)
        animation(videos, options.out, columns=columns, fps=options.fps)
        sys.stdout.write(f"moving picture: {options.out}\n")
        return
    if options.beside:
        rows = beside(options.folders, columns)
        columns = len(rows[0][1])
    else:
        rows = below(options.folders)
    contact_sheet(rows, options.out, columns=columns)
    sys.stdout.write(f"contact sheet: {options.out}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of sampling runs")
    parser.add_argument("--out", required=True, type=Path, help="the PNG to write; .webp or .gif: videos play")
    parser.add_argument(
        "--columns", type=int, default=5, help="frames of each video (5); .webp or .gif: videos in a row"
    )
    parser.add_argument("--fps", type=float, default=8, help="frames per second of a moving picture (8)")
    parser.add_argument("--beside", action="store_true", help="put the runs beside each other, not below")
    return run_command(work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
