"""Length, rate and size of every clip of a data set, found once and kept.

They come from the columns of a manifest, or from the index: a JSON file that knows each clip by path, size and time of
its last change. It lies in the data folder, or, where nothing may be written there, in the user's cache.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sgm.data.clips.decode import ClipError, probe
from sgm.data.rows import ClipFile, Row, VideoInfo
from sgm.io import atomic_file
from sgm.log import get_logger, is_rank_zero
from sgm.util import RunError

logger = get_logger(__name__)

NAME = ".clip_index.json"
KEPT_FROM = 200  # clips; fewer are read again sooner than a file in the data folder is explained
_SAVE_EVERY = 5000  # clips, so that a long scan that is interrupted goes on where it was


def clip_infos(rows: Sequence[Row], folder: str | Path, *, num_threads: int = 8) -> list[VideoInfo | str]:
    """Return what is known of each clip, reading only those of which neither manifest nor index knows.

    For one process at a time: of several ranks, let one call it and the others have its result.

    Args:
        rows: of a data set.
        folder: of the data set, where the index lies.
        num_threads: clips read at a time.

    Returns:
        For each row what is known of it, or why it cannot be used.
    """
    folder, stamps = Path(folder), _Stamps()
    known = _read(folder)
    keys = [_key(row.path, folder) for row in rows]
    found: list[VideoInfo | str | None] = [
        row.problem or row.info or _known(known.get(key), stamps.of(row.path))
        for row, key in zip(rows, keys, strict=True)
    ]
    missing = [place for place, info in enumerate(found) if info is None]
    bar = tqdm(total=len(missing), desc="read clips", leave=False, disable=None if is_rank_zero() else True)
    with ThreadPoolExecutor(num_threads) as pool, bar:
        for start in range(0, len(missing), _SAVE_EVERY):
            part = missing[start : start + _SAVE_EVERY]
            for place, info in zip(part, pool.map(_probe, [rows[place].path for place in part]), strict=True):
                found[place] = info
                bar.update()
            remember({rows[place].path: info for place in part if isinstance(info := found[place], VideoInfo)}, folder)
    return [info for info in found if info is not None]


def remember(infos: Mapping[ClipFile, VideoInfo], folder: str | Path) -> None:
    """Add clips to the index of a data folder of at least `KEPT_FROM`; where it cannot be written, say so and go on."""
    folder, stamps = Path(folder), _Stamps()
    fresh = {_key(file, folder): [*stamp, *astuple(info)] for file, info in infos.items() if (stamp := stamps.of(file))}
    known = _read(folder) | fresh
    if not fresh or len(known) < KEPT_FROM:
        return
    path = index_path(folder)
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(known, ensure_ascii=False), encoding="utf-8")
    except RunError as error:
        logger.warning("clips will be read again next time: %s", error)


def index_path(folder: str | Path) -> Path:
    """Return where the index of a data folder is written."""
    folder = Path(folder).absolute()
    if os.access(folder, os.W_OK | os.X_OK):
        return folder / NAME
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "cogvideox-sat" / f"clips-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"


def _read(folder: Path) -> dict[str, list[Any]]:
    """Return the index: one that lies in a folder that is read-only now, and what was added in the cache since."""
    known: dict[str, list[Any]] = {}
    for path in dict.fromkeys((folder.absolute() / NAME, index_path(folder))):
        try:
            known |= json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read and is written anew: %s", path, error)
    return known


def _known(entry: list[Any] | None, stamp: tuple[int, int] | None) -> VideoInfo | None:
    return VideoInfo(*entry[2:]) if entry and len(entry) == 7 and stamp == tuple(entry[:2]) else None


def _key(file: ClipFile, folder: Path) -> str:
    """Return the name of a clip, relative to the folder where it can be, so that the folder may move."""
    return str(file).removeprefix(f"{folder}{os.sep}")


class _Stamps:
    """Size and time of change of what clips lie in, each asked for once: a file, or the files of a folder together."""

    def __init__(self) -> None:
        self._of: dict[Path, tuple[int, int] | None] = {}

    def of(self, file: ClipFile) -> tuple[int, int] | None:
        path = file if isinstance(file, Path) else file.container
        if path not in self._of:
            try:
                found = [part.stat() for part in ([path] if isinstance(file, Path) else _parts(path))]
                self._of[path] = sum(part.st_size for part in found), max(part.st_mtime_ns for part in found)
            except (OSError, ValueError):
                self._of[path] = None
        return self._of[path]


def _parts(container: Path) -> list[Path]:
    """Return the files of a container, not the index in it: writing that changes the folder, and no clip."""
    if not container.is_dir():
        return [container]
    return [path for path in container.iterdir() if path.is_file() and not path.name.startswith(".")]


def _probe(file: ClipFile) -> VideoInfo | str:
    try:
        return probe(file)
    except ClipError as error:
        return error.reason
