"""Check data sets of any format before training on them; docs/data.md shows the formats.

    python tools/check_dataset.py assets/toy --video_size 64 64 --max_num_frames 17 --skip_frms_num 0
    python tools/check_dataset.py my_clips --base configs/cogvideox_5b.yaml configs/sft.yaml --json report.json

Prints a line for each clip: what it is, how many frames training takes of it, and what is wrong with it; then how
sizes, durations and frame rates are spread. Exit code 0 means that all clips are good, 1 that some are not, 2 that the
command was given something wrong.
"""

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgm.config.load import ConfigError
from sgm.config.targets import check_params
from sgm.config.yaml_files import Merged, read_merged
from sgm.data.clips.check import RowReport, bad_share, histograms, summary_text, table, write_report
from sgm.data.clips.decode import ClipError
from sgm.inference.video import contact_sheet, to_uint8
from sgm.log import configure_logging
from sgm.util import InputError, RunError, get_obj_from_str, instantiate_from_config

DATASET = "data_video.SFTDataset"
PARAMS = (
    *("video_size", "fps", "max_num_frames", "skip_frms_num", "allow_missing_captions", "format"),
    *("caption_column", "video_column", "image_column"),
)
SHEET_CLIPS, SHEET_COLUMNS = 24, 5


def data_section(bases: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Return the ``data`` section of merged YAML files, with the parameters `given` on the command line."""
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
    found = Merged()
    check_params(get_obj_from_str(section["target"]), section["params"], ("data", "params"), found, partial=True)
    if found.problems:
        raise ConfigError(found.problems)
    return section


def check(datasets: Sequence[Any], target: str, *, rows_only: bool, decode: bool) -> list[RowReport]:
    """Check all clips of the data sets."""
    method = "row_reports" if rows_only else "check"
    reports: list[RowReport] = []
    for dataset in datasets:
        if not hasattr(dataset, method):
            raise InputError(f"{target} cannot check its clips: it has no method '{method}', as {DATASET} has")
        reports += dataset.row_reports() if rows_only else dataset.check(decode=decode)
    return reports


def write_sheet(path: Path, datasets: Sequence[Any], bad: Collection[str]) -> int:
    """Draw clips as training sees them, evenly chosen among the good ones; return how many."""
    good = [(dataset, place) for dataset in datasets for place, name in enumerate(dataset.paths) if name not in bad]
    chosen = np.unique(np.linspace(0, len(good) - 1, min(SHEET_CLIPS, len(good))).round().astype(int)) if good else []
    rows = []
    for number in chosen:
        dataset, place = good[number]
        try:
            sample = dataset[place]
        except ClipError as error:  # clips that were not opened before
            sys.stderr.write(f"left out of the contact sheet: {error}\n")
            continue
        shown = np.linspace(0, len(sample["mp4"]) - 1, min(SHEET_COLUMNS, len(sample["mp4"]))).round().astype(int)
        rows.append((f"{Path(sample['path']).name}: {sample['txt']}", to_uint8(sample["mp4"][shown])))
    if not rows:
        raise RunError(f"there is no good clip for the contact sheet {path}")
    contact_sheet(rows, path, columns=SHEET_COLUMNS)
    return len(rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DATA", help="folders, manifests, archives: as args.train_data")
    parser.add_argument("--base", nargs="+", default=[], metavar="YAML", help="files whose data section says the rest")
    params = parser.add_argument_group("parameters of the data section, stronger than those of --base")
    params.add_argument("--video_size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"))
    params.add_argument("--fps", type=float)
    params.add_argument("--max_num_frames", type=int)
    params.add_argument("--skip_frms_num", type=int)
    params.add_argument("--allow_missing_captions", action="store_true", default=None)
    params.add_argument("--format")
    for kind in ("caption", "video", "image"):
        params.add_argument(f"--{kind}_column")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--decode", action="store_true", help="decode every frame: takes long, finds damage inside")
    extent.add_argument("--rows_only", action="store_true", help="open no clip: captions, paths, and that files exist")
    parser.add_argument("--contact_sheet", type=Path, metavar="FILE.png", help=f"draw up to {SHEET_CLIPS} clips there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(argv)
    configure_logging(debug=options.debug)
    given = {name: getattr(options, name) for name in PARAMS if getattr(options, name) is not None}
    try:
        section = data_section(options.base, given)
        datasets = [instantiate_from_config(section, data_dir=folder) for folder in options.folders]
        reports = check(datasets, section["target"], rows_only=options.rows_only, decode=options.decode)
        parts = (table(reports), summary_text(reports), histograms(reports))
        sys.stdout.write("\n\n".join(part for part in parts if part) + "\n")
        if options.contact_sheet:
            bad = {report.path for report in reports if report.problems}
            sys.stdout.write(f"{write_sheet(options.contact_sheet, datasets, bad)} clips: {options.contact_sheet}\n")
        if options.json:
            write_report(options.json, reports)
            sys.stdout.write(f"report: {options.json}\n")
    except (InputError, RunError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 1 if bad_share(reports) else 0


if __name__ == "__main__":
    sys.exit(main())
