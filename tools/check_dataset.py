"""Check the clips and captions of data folders before training on them.

    python tools/check_dataset.py assets/toy --video_size 64 64 --max_num_frames 17 --skip_frms_num 0
    python tools/check_dataset.py my_clips --base configs/cogvideox_5b.yaml configs/sft.yaml --json report.json

Prints a line for each clip: what it is, how many frames training takes of it, and what is wrong with it. Exit code 0
means that all clips are good, 1 that some are not, 2 that the command was given something wrong.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sgm.config import ConfigError
from sgm.config_targets import check_params
from sgm.data.check import RowReport, bad_share, summary_text, table, write_report
from sgm.log import configure_logging
from sgm.util import InputError, RunError, get_obj_from_str, instantiate_from_config
from sgm.yaml_files import Merged, read_merged

DATASET = "data_video.SFTDataset"


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


def check(folders: list[str], section: dict[str, Any], *, decode: bool) -> list[RowReport]:
    """Check all clips of the folders."""
    reports: list[RowReport] = []
    for folder in folders:
        dataset = instantiate_from_config(section, data_dir=folder)
        if not hasattr(dataset, "check"):
            raise InputError(f"{section['target']} cannot check its clips: it has no method 'check', as {DATASET} has")
        reports += dataset.check(decode=decode)
    return reports


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DATA_DIR", help="folders as in args.train_data")
    parser.add_argument("--base", nargs="+", default=[], metavar="YAML", help="files whose data section says the rest")
    params = parser.add_argument_group("parameters of the data section, stronger than those of --base")
    params.add_argument("--video_size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"))
    params.add_argument("--fps", type=float)
    params.add_argument("--max_num_frames", type=int)
    params.add_argument("--skip_frms_num", type=int)
    params.add_argument("--allow_missing_captions", action="store_true", default=None)
    parser.add_argument("--decode", action="store_true", help="decode every frame: takes long, finds damage inside")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(argv)
    configure_logging(debug=options.debug)
    names = ("video_size", "fps", "max_num_frames", "skip_frms_num", "allow_missing_captions")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    try:
        reports = check(options.folders, data_section(options.base, given), decode=options.decode)
        sys.stdout.write(f"{table(reports)}\n\n{summary_text(reports)}\n")
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
