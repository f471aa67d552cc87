"""Metadata of every clip of a data set, read once and cached in an index.

The index is a JSON file: path of each clip → version of the reader, file size, modification time, metadata. It is in
the data folder, or in the user's cache if that folder is read-only. Manifest columns replace it.
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any

from sgm.data.clips.decode import READER, ClipError, probe
from sgm.data.rows import ClipFile, Row, VideoInfo
from sgm.io import atomic_file, json_bytes, parse_json
from sgm.log import bar, get_logger
from sgm.util import RunError

logger = get_logger(__name__)

NAME = ".clip_index.json"
KEPT_FROM = 200  # clips; smaller data sets are read again instead of writing an index
_SAVE_EVERY = 5000  # clips, so that an interrupted scan can continue


def clip_infos(rows: Sequence[Row], folder: str | Path, *, num_threads: int = 8) -> list[VideoInfo | str]:
    """Return the metadata of each clip from manifest, index, or the clip itself.

    Call from one process at a time and broadcast the result to other ranks.

    Args:
        rows: of a data set.
        folder: of the data set, with the index.
        num_threads: clips read at a time.

    Returns:
        For each row the metadata, or why the clip cannot be used.
    """
    folder, stamp_of = Path(folder), stamps()
    known = _read_index(folder)
    found: list[VideoInfo | str | None] = [
        row.problem or row.info or _from_index(known.get(_key(row.path, folder)), stamp_of(row.path)) for row in rows
    ]
    missing = [place for place, info in enumerate(found) if info is None]
    with ThreadPoolExecutor(num_threads) as pool, bar(what="read clips", total=len(missing)) as done:
        for start in range(0, len(missing), _SAVE_EVERY):
            part = missing[start : start + _SAVE_EVERY]
            for place, info in zip(part, pool.map(_probe, [rows[place].path for place in part]), strict=True):
                found[place] = info
                done.update()
            remember({rows[place].path: info for place in part if isinstance(info := found[place], VideoInfo)}, folder)
    return [info for info in found if info is not None]


def remember(infos: Mapping[ClipFile, VideoInfo], folder: str | Path) -> None:
    """Add clips to the index if it has at least `KEPT_FROM`; log a warning if it cannot be written."""
    folder, stamp_of = Path(folder), stamps()
    fresh = {
        _key(file, folder): [READER, *stamp, *astuple(info)]
        for file, info in infos.items()
        if (stamp := stamp_of(file))
    }
    known = _read_index(folder) | fresh
    if not fresh or len(known) < KEPT_FROM:
        return
    path = index_path(folder)
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(json_bytes(known))
    except RunError as error:
        logger.warning("clips will be read again next time: %s", error)


def index_path(folder: str | Path) -> Path:
    """Return the path to which the index of a data folder is written."""
    folder = Path(folder).absolute()
    if os.access(folder, os.W_OK | os.X_OK):
        return folder / NAME
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return user_cache / "cogvideox-sat" / f"clips-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.json"


def _read_index(folder: Path) -> dict[str, Any]:
    """Return the folder's index, updated from the user's cache if the folder is read-only."""
    known: dict[str, Any] = {}
    for path in dict.fromkeys((folder.absolute() / NAME, index_path(folder))):
        try:
            known |= parse_json(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read and is rewritten: %s", path, error)
    return known


def _from_index(entry: Any, stamp: tuple[int, int] | None) -> VideoInfo | None:
    """Return the metadata of an entry that this reader made of this file; None if it holds anything else."""
    if not isinstance(entry, list) or len(entry) != 8 or stamp is None or entry[:3] != [READER, *stamp]:
        return None
    info = VideoInfo(*entry[3:])
    are_counts = all(type(value) is int and value > 0 for value in (info.num_frames, info.height, info.width))
    are_numbers = all(type(value) in (int, float) and 0 <= value < math.inf for value in (info.fps, info.duration))
    return info if are_counts and are_numbers else None


def _key(file: ClipFile, folder: Path) -> str:
    """Return the path of a clip, relative if it is below the folder, so that the folder may move."""
    return str(file).removeprefix(f"{folder}{os.sep}")


def stamps() -> Callable[[ClipFile], tuple[int, int] | None]:
    """Return `_stamp` of the file or container of a clip, computed once per path."""
    known = cache(_stamp)
    return lambda clip: known(clip if isinstance(clip, Path) else clip.container)


def _stamp(path: Any) -> tuple[int, int] | None:
    """Return size and modification time of a file, or of the files of a container; None if it cannot be read."""
    if not isinstance(path, Path):
        return path.stamp
    try:
        found = [part.stat() for part in _parts(path)]
        return sum(part.st_size for part in found), max(part.st_mtime_ns for part in found)
    except (OSError, ValueError):
        return None


def _parts(container: Path) -> list[Path]:
    """Return the files of a container, without the hidden index."""
    if not container.is_dir():
        return [container]
    return [path for path in container.iterdir() if path.is_file() and not path.name.startswith(".")]


def _probe(file: ClipFile) -> VideoInfo | str:
    try:
        return probe(file)
    except ClipError as error:
        return error.reason
