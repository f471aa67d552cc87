"""Check data sets of any format before training on them; docs/data.md shows the formats.

    python tools/check_dataset.py assets/toy --video_size 64 64 --max_num_frames 17 --skip_frms_num 0
    python tools/check_dataset.py my_clips --base configs/cogvideox_5b.yaml configs/sft.yaml --json report.json

Prints a line per clip: metadata, the number of frames that training selects, problems; then the distributions of sizes,
durations and frame rates. Exit codes: 0 all clips are good, 1 some are not, 2 wrong input.
"""

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgm.cli import add_trust, run_command, tool_parser
from sgm.config.load import ConfigError
from sgm.config.targets import check_sections, trusting
from sgm.config.yaml_files import Merged, read_merged
from sgm.data.clips.check import RowReport, bad_share, histograms, summary_text, table, write_report
from sgm.data.clips.decode import ClipError
from sgm.data.remote.store import make_store, store_param
from sgm.inference.video import contact_sheet, to_uint8
from sgm.io import require_own_json, require_writable
from sgm.util import InputError, RunError, instantiate_from_config

DATASET = "data_video.SFTDataset"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NUMBERS = {"fps": float, "max_num_frames": int, "skip_frms_num": int}
NAMES = ("format", "caption_column", "video_column", "image_column")
SHEET_CLIPS, SHEET_COLUMNS = 24, 5


def data_section(bases: list[str], given: dict[str, Any], trust: Sequence[str] = ()) -> dict[str, Any]:
    """Return the ``data`` section of merged YAML files, overridden by the parameters `given` on the command line."""
    section: dict[str, Any] = {}
    if bases:
        merged = read_merged(bases)
        if merged.problems:
            raise ConfigError(merged.problems)
        section = merged.values.get("data") or {}
        if not isinstance(section, dict) or "target" not in section:
            raise InputError(f"{', '.join(bases)}: no section data with a target; give configs/sft.yaml as well")
    section = {"target": section.get("target", DATASET), "params": {**(section.get("params") or {}), **given}}
    if section["params"].get("video_size") is None:
        raise InputError("the size that clips are trained at is missing; give --video_size HEIGHT WIDTH, or --base")
    section, found = trusting(section, trust), Merged()
    check_sections(section, ("data",), found, partial=True)
    if found.problems:
        raise ConfigError(found.problems)
    return section


def check(datasets: Sequence[Any], target: str, *, rows_only: bool, decode: bool) -> list[RowReport]:
    """Check all clips of the data sets."""
    method, settings = ("row_reports", {}) if rows_only else ("check", {"decode": decode})
    if any(not hasattr(dataset, method) for dataset in datasets):
        raise InputError(f"{target} cannot check its clips: it has no method '{method}', as {DATASET} has")
    return [report for dataset in datasets for report in getattr(dataset, method)(**settings)]


def write_sheet(path: Path, datasets: Sequence[Any], bad: Collection[str]) -> int:
    """Draw evenly spaced good clips as training shows them; return their number."""
    good = [(dataset, place) for dataset in datasets for place, name in enumerate(dataset.paths) if name not in bad]
    chosen = np.unique(np.linspace(0, len(good) - 1, min(SHEET_CLIPS, len(good))).round().astype(int)) if good else []
    rows = []
    for number in chosen:
        dataset, place = good[number]
        try:
            sample = dataset[place]
        except ClipError as error:  # of a clip that was not opened by the check
            sys.stderr.write(f"left out of the contact sheet: {error}\n")
            continue
        shown = np.linspace(0, len(sample["mp4"]) - 1, min(SHEET_COLUMNS, len(sample["mp4"]))).round().astype(int)
        rows.append((f"{Path(sample['path']).name}: {sample['txt']}", to_uint8(sample["mp4"][shown])))
    if not rows:
        raise RunError(f"there is no good clip for the contact sheet {path}")
    contact_sheet(rows, path, columns=SHEET_COLUMNS)
    return len(rows)


def _require_no_clip(picture: Path, datasets: Sequence[Any]) -> None:
    """Refuse to draw over a picture that is a clip of the data sets."""
    for path in (str(path) for dataset in datasets for path in getattr(dataset, "paths", ())):
        if os.path.basename(path) == picture.name and os.path.exists(path) and os.path.samefile(path, picture):
            raise InputError(f"--contact_sheet {picture} is a clip of the data; name another file")


def work(options: argparse.Namespace) -> None:
    """Check the data sets and print the reports; ``options.has_bad`` says whether a clip is bad."""
    for path in filter(None, (options.contact_sheet, options.json)):
        require_writable(path.parent, path.name)
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file in it")
    if options.json:
        require_own_json(options.json, "summary")
    if options.contact_sheet and options.contact_sheet.suffix.lower() not in PICTURES:
        raise InputError(f"--contact_sheet {options.contact_sheet}: name a file that ends in {', '.join(PICTURES)}")
    names = ("video_size", "allow_missing_captions", *NUMBERS, *NAMES)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    section = data_section(options.base, given, options.trust)
    store = make_store(options.remote_cache, options.remote_cache_gb, options.remote_retries)
    datasets = [
        instantiate_from_config(section, data_dir=folder, **store_param(section, folder, store))
        for folder in options.folders
    ]
    if options.contact_sheet and options.contact_sheet.exists():
        _require_no_clip(options.contact_sheet, datasets)
    reports = check(datasets, section["target"], rows_only=options.rows_only, decode=options.decode)
    options.has_bad = bad_share(reports) > 0
    parts = (table(reports), summary_text(reports), histograms(reports))
    sys.stdout.write("\n\n".join(part for part in parts if part) + "\n")
    if options.contact_sheet:
        bad = {report.path for report in reports if report.problems}
        sys.stdout.write(f"{write_sheet(options.contact_sheet, datasets, bad)} clips: {options.contact_sheet}\n")
    if options.json:
        write_report(options.json, reports)
        sys.stdout.write(f"report: {options.json}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "folders", nargs="+", metavar="DATA", help="folders, manifests, archives, URLs: as args.train_data"
    )
    parser.add_argument("--base", nargs="+", default=[], metavar="YAML", help="files with a data section")
    add_trust(parser)
    params = parser.add_argument_group("parameters of the data section, which override those of --base")
    params.add_argument("--video_size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"))
    params.add_argument("--allow_missing_captions", action="store_true", default=None)
    for name in (*NUMBERS, *NAMES):
        params.add_argument(f"--{name}", type=NUMBERS.get(name, str))
    afar = parser.add_argument_group("data behind URLs, as the keys of args of these names")
    afar.add_argument("--remote_cache", metavar="FOLDER")
    afar.add_argument("--remote_cache_gb", type=float, default=50.0, metavar="GB")
    afar.add_argument("--remote_retries", type=int, default=5, metavar="N")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--decode", action="store_true", help="decode every frame: slow, finds damage inside")
    extent.add_argument("--rows_only", action="store_true", help="open no clip: check captions, paths and existence")
    parser.add_argument("--contact_sheet", type=Path, metavar="FILE.png", help=f"draw up to {SHEET_CLIPS} clips there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    options = parser.parse_args(argv)
    options.has_bad = False
    code = run_command(
        work, options, interrupted="interrupted", memory_hint="check fewer folders, or smaller clips, at a time"
    )
    return code or int(options.has_bad)


if __name__ == "__main__":
    sys.exit(main())
