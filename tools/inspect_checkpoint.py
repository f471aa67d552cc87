"""Describe files or folders of weights: layout, model, precision, size, LoRA, state of a training.

    python tools/inspect_checkpoint.py assets/toy/transformer assets/toy/vae/3d-vae.pt
    python tools/inspect_checkpoint.py ckpts/sft-06-30-12-00 --json
    python tools/inspect_checkpoint.py CogVideoX-5b --verify
    python tools/inspect_checkpoint.py my-lora/pytorch_lora_weights.safetensors --tensors

Only headers are read, so the time does not depend on the file size; --verify reads everything.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sgm.cli import run_command, tool_parser


def report(options: argparse.Namespace) -> None:
    """Write descriptions of the paths, then the errors."""
    from sgm.conversion.inspection import inspect_checkpoint, verify_checkpoint
    from sgm.util import InputError

    entries: list[dict[str, Any]] = []
    tables, failures = [], []
    for path in options.paths:
        try:
            found = inspect_checkpoint(path)
            verified = verify_checkpoint(path) if options.verify else None
        except InputError as error:
            failures.append(str(error))
            entries.append({"path": str(path), "error": str(error)})
        else:
            entries.append(found.to_json(tensors=options.tensors) | ({"verified": verified} if verified else {}))
            tables.append(found.table(tensors=options.tensors) + (_verified(**verified) if verified else ""))
    if options.json:
        sys.stdout.write(json.dumps(entries, indent=2) + "\n")
    elif tables:
        sys.stdout.write("\n\n".join(tables) + "\n")
    if failures:
        raise InputError("\n".join(failures))


def _verified(with_checksums: int, without: int) -> str:
    more = f"; {without} have none, and only their values were read" if without else ""
    return f"\n  {'verified':<12}{with_checksums} files match their checksums{more}"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    parser.add_argument("--json", action="store_true", help="a JSON list, an object for each path")
    parser.add_argument("--verify", action="store_true", help="read all bytes, and compare them with their checksums")
    parser.add_argument("--tensors", action="store_true", help="names, dtypes and shapes too")
    return run_command(
        report, parser.parse_args(argv), interrupted="interrupted", memory_hint="close what else uses the memory"
    )


if __name__ == "__main__":
    sys.exit(main())
