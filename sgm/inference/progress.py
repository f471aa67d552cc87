"""Progress of a sampling run: a bar or lines, and a file for a program that watches the run."""

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.io import json_bytes, parse_json
from sgm.log import bar, is_rank_zero

# Environment variable: the file that a program which watches this run reads; see `read_progress`.
PROGRESS_FILE = "SAMPLING_PROGRESS_FILE"


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        what: is counted: ``text encoder`` and ``prompts``, or the ``steps`` of a sample.
        done: how many are.
        total: of how many.
    """

    what: str
    done: int
    total: int


def progress(items: Collection[Any], description: str, *, leave: bool = False) -> Any:
    """Show progress, see `sgm.log.bar`, and write the file of `PROGRESS_FILE`; on rank zero only."""
    shown = bar(items, description, leave=leave)
    path = os.environ.get(PROGRESS_FILE)
    return _recorded(shown, description, len(items), Path(path)) if path and is_rank_zero() else shown


def _recorded(items: Any, what: str, total: int, path: Path) -> Iterator[Any]:
    for done, item in enumerate(items):
        _write(path, Progress(what, done, total))
        yield item
    _write(path, Progress(what, total, total))


def _write(path: Path, now: Progress) -> None:
    """Replace the file; no flush to disk, and no failure of the run if nobody can read its progress."""
    with contextlib.suppress(OSError):
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(json_bytes(vars(now)))
        beside.replace(path)


def read_progress(path: Path) -> Progress | None:
    """Return the progress of a run with this file; None before it began to count."""
    try:
        return Progress(**parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
