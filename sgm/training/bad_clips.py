"""Clips that turned out to be unreadable."""

import json
from collections.abc import Iterable
from pathlib import Path

import sgm.distributed
from sgm.io import write_json
from sgm.log import get_logger
from sgm.util import RunError

logger = get_logger(__name__)

NAME = "quarantine.json"


class BadClips:
    """The unreadable clips of a run, with the reason, in ``quarantine.json``; a resumed run knows those of before.

    Args:
        folder: of the run.
        num_clips: training clips in all.
        max_share: share of them that may be unreadable.
        known: those found before training: path → reason.
    """

    def __init__(self, folder: Path, num_clips: int, max_share: float, known: dict[str, str] | None = None) -> None:
        self.folder, self.num_clips, self.max_share = folder, num_clips, max_share
        self.reasons = _read(folder / NAME) | (known or {})
        self._fresh: dict[str, str] = {}

    def add(self, failures: Iterable[tuple[str, str]]) -> None:
        """Note failures of this rank: (path, reason)."""
        for path, reason in failures:
            if path not in self.reasons:
                logger.warning("quarantined %s: %s; another clip takes its place", path, reason)
                self.reasons[path] = self._fresh[path] = reason

    def all_gather_and_write(self) -> int:
        """Exchange what ranks found, write it down, and return the number of clips; all ranks call together.

        Raises:
            RunError: more clips than allowed are unreadable.
        """
        found = [fresh for fresh in sgm.distributed.all_gather_objects(self._fresh) if fresh]
        self._fresh = {}
        for fresh in found:
            self.reasons |= fresh
        if found and sgm.distributed.rank() == 0:
            write_json(self.folder / NAME, dict(sorted(self.reasons.items())))
        if len(self.reasons) > self.max_share * self.num_clips:
            listed = "\n".join(f"  {path}: {reason}" for path, reason in sorted(self.reasons.items())[:10])
            raise RunError(
                f"{len(self.reasons)} of {self.num_clips} training clips cannot be read, more than "
                f"args.max_bad_share={self.max_share:g} allows:\n{listed}\nrepair or remove them "
                "(tools/check_dataset.py lists all), or raise args.max_bad_share"
            )
        return len(self.reasons)


def _read(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read and is written anew: %s", path, error)
        return {}
