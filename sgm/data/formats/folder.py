"""A folder of clips and captions: ``videos/a/b.mp4`` with ``labels/a/b.txt``, or the caption beside the clip.

A clip may have a control, ``control/a/b.mp4``, and a mask, ``mask/a/b.mp4`` or a picture.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sgm.data.rows import PICTURE_SUFFIXES, VIDEO_SUFFIXES, Files, Row, caption_of, is_picture, require_file
from sgm.data.tar import refuse_compressed
from sgm.io import denied_text
from sgm.log import get_logger, warn_once
from sgm.util import InputError, nearest_path, no_character

logger = get_logger(__name__)

VIDEOS, LABELS, CONTROL, MASK = "videos", "labels", "control", "mask"
_SHOWN = 5  # names of a warning
_SUFFIXES = (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES, *map(str.upper, VIDEO_SUFFIXES + PICTURE_SUFFIXES))
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_NOWHERE = "is a link that leads nowhere; restore the file, or remove the link"


def list_folder(data_dir: str | Path, *, allow_missing_captions: bool = False) -> list[Row]:
    """List all clips below a folder by path, following links, without hidden files, without opening clips.

    Captions that no clip has are named in a warning: it may have a suffix that is not read.

    A picture with a caption is a clip of one frame, unless there is a video of the same name (then it is a cover).

    Args:
        data_dir: folder with ``videos`` and ``labels``, at any depth, or with captions beside the clips.
        allow_missing_captions: accept a missing or empty caption as an empty one.

    Raises:
        InputError: the folder does not exist, has no clips, or is the ``videos`` folder itself.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        hint = "" if root.exists() else nearest_path(root)
        raise InputError(f"data folder '{root}' {found}{hint}; give a folder that holds {VIDEOS}/ and {LABELS}/")
    if root.absolute().name == VIDEOS and (root.absolute().parent / LABELS).is_dir():
        raise InputError(f"data folder '{root}' is the {VIDEOS} folder itself; give the one above: '{root.parent}'")
    files = files_below(root)
    clips = sorted(_clips(files, root), key=lambda path: path.relative_to(root).as_posix())
    if not clips:
        refuse_compressed(root, (path.name for path in files if path.parent == root))
        raise InputError(
            f"data folder '{root}' holds no clips ({', '.join(VIDEO_SUFFIXES)}); put them into {root / VIDEOS} and "
            f"their captions, a text file each, into {root / LABELS}"
        )
    warn_once(logger, _left_out(files, clips, root))
    listed = Files(root)
    rows = [
        replace(
            _row(clip, caption_path(clip, root), allow_missing_captions)
            if listed.has(clip)
            else Row(clip, "", _NOWHERE),
            control=_companion(clip, root, listed, CONTROL),
            mask=_companion(clip, root, listed, MASK),
        )
        for clip in clips
    ]
    if not any(row.caption for row in rows):
        warn_once(logger, _unread_tables(files, root))
    return rows


def caption_path(clip: Path, root: Path) -> Path:
    """Return the path of a clip's caption: the last folder ``videos`` below `root` becomes ``labels``."""
    return _beside(clip, root, LABELS).with_suffix(".txt")


def _beside(clip: Path, root: Path, folder: str) -> Path:
    """Return the path of a clip with another folder in the place of the last ``videos`` below `root`."""
    parts = list(clip.relative_to(root).parts)
    folders = parts[:-1]
    if VIDEOS in folders:
        parts[len(folders) - 1 - folders[::-1].index(VIDEOS)] = folder
    return root.joinpath(*parts)


def _companion(clip: Path, root: Path, files: Files, folder: str) -> Path | None:
    """Return the control or mask of a clip, of the same name in another folder, with any suffix; None without one."""
    path = _beside(clip, root, folder)
    if path == clip:
        return None
    there = files.names(os.path.dirname(path))
    if not there:  # as for most data sets, of which each clip would try all suffixes
        return None
    names = (path.name, *(path.stem + suffix for suffix in _SUFFIXES))
    return next((path.with_name(name) for name in names if name in there), None)


def files_below(root: Path) -> list[Path]:
    """Return all files below a folder, following links, but for hidden ones and those of controls and masks.

    Raises:
        InputError: a folder may not be listed.
    """
    found, seen = [], set()
    for folder, inner, names in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        others = {CONTROL, MASK} if VIDEOS in inner else set()
        inner[:] = [] if real in seen else [n for n in inner if not n.startswith(".") and n not in others]
        if real not in seen:  # links can form a cycle
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return found


def _clips(files: list[Path], root: Path) -> list[Path]:
    clips = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    taken = {path.with_suffix("") for path in clips}
    there = {*files}
    pictures = (path for path in files if is_picture(path) and path.with_suffix("") not in taken)
    return clips + [path for path in pictures if {caption := caption_path(path, root), _upper(caption)} & there]


def _left_out(files: list[Path], clips: list[Path], root: Path) -> Iterator[str]:
    """Yield a warning if there are captions without a clip: in folders of captions, or beside another file."""
    stem = {path: os.path.splitext(path)[0] for path in files}
    used = {os.path.splitext(caption_path(clip, root))[0] for clip in clips}
    texts = [path for path in files if path.suffix.lower() == ".txt" and stem[path] not in used]
    others = {stem[path] for path in files if path.suffix.lower() != ".txt"} if texts else set()
    names = [
        path.relative_to(root) for path in texts if stem[path] in others or LABELS in path.relative_to(root).parts[:-1]
    ]
    if names:
        shown = ", ".join(sorted(map(str, names))[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        have = "1 caption has" if len(names) == 1 else f"{len(names):,} captions have"
        kinds = " ".join(VIDEO_SUFFIXES + PICTURE_SUFFIXES)
        yield f"{root}: {have} no clip that is read: {shown}; clips end with {kinds}"


def _unread_tables(files: list[Path], root: Path) -> Iterator[str]:
    """Yield a warning if captions may be in tables that are not read: those of other names than ``metadata``."""
    names = sorted(path.name for path in files if path.parent == root and path.suffix.lower() in _TABLES)
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        yield (
            f"{root}: no clip has a caption in a text file, and {shown} is not read; if captions are there, give that "
            "file instead of the folder: a .csv with commas, .json, .jsonl or .parquet"
        )


def _upper(caption: Path) -> Path:
    """Return the name of a caption as cameras and old systems write it: ``IMG_1.TXT``."""
    return caption.with_suffix(caption.suffix.upper())


def _refuse(error: OSError) -> None:
    """Refuse a folder that cannot be listed, whose clips would be missing silently."""
    raise InputError(
        denied_text(error) if isinstance(error, PermissionError) else f"{error.filename}: {error.strerror}"
    ) from error


def _row(clip: Path, caption: Path, allow_missing: bool) -> Row:
    try:
        require_file(caption)
        text = caption_of(caption.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        return Row(clip, "", f"caption {caption} is not UTF-8 text (byte {error.start}); save it as UTF-8")
    except FileNotFoundError:
        if _upper(caption).is_file():
            return _row(clip, _upper(caption), allow_missing)
        problem = f"its caption {caption} is missing; write it"
    except OSError as error:
        return Row(clip, "", f"caption {caption} cannot be read: {error.strerror or error}")
    else:
        if problem := no_character(text):
            return Row(clip, "", f"caption {caption} holds {problem}; save it as UTF-8")
        if text:
            return Row(clip, text)
        problem = f"its caption {caption} is empty; write one"
    return Row(clip, "", None if allow_missing else f"{problem}, or set allow_missing_captions: true")
