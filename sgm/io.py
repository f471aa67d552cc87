"""Atomic file writes, JSON, readable sizes, and the temporary files of killed writers."""

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sgm.util import InputError, RunError

# The temporary names of `atomic_file`: hidden, with process number and random digits.
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]+(\.\w+)?")


@contextlib.contextmanager
def atomic_file(path: str | Path, *, need_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; after the block, flush the file to disk and rename it to `path`.

    If the block fails, `path` is unchanged and the temporary file is removed. The temporary name is hidden and keeps
    the suffix, which selects the format in many writers. Missing folders are created.

    Args:
        path: the file to write or replace.
        need_bytes: its size, if known, for the disk-full message.

    Raises:
        RunError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # Some writers create private files (safetensors: 0600).
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except (InputError, RunError):
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        raise RunError(_write_failure(path, error, need_bytes)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_writable(folder: str | Path) -> None:
    """Check that `folder`, or its nearest existing parent, is a writable folder.

    Raises:
        InputError: it is not.
    """
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"'{folder}' cannot be written to: {existing} is no folder, or you may not write to it")
    try:
        for name in folder.relative_to(existing).parts:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(existing / name)  # fails in another way for a name that is too long
        with tempfile.TemporaryFile(dir=existing):  # permissions do not prove it: /proc, a full or read-only disk
            pass
    except OSError as error:
        raise InputError(f"'{folder}' cannot be written to: {existing}: {error.strerror}") from error


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON.

    Raises:
        RunError: the file could not be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of `atomic_file` left by a killed process; nothing may be writing to `folder`."""
    for path in folder.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX systems open folders
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_failure(path: Path, error: Exception, need_bytes: int | None) -> str:
    """Return the message for a failed write, with the bytes needed and free."""
    existing = next((p for p in path.parents if p.is_dir()), Path("."))
    needs = f"it needs {readable_size(need_bytes)}, " if need_bytes else ""
    return (
        f"could not write {path}: {error}; {needs}{readable_size(shutil.disk_usage(existing).free)} are free there; "
        "free some space, correct the permissions, or choose another folder"
    )


def readable_size(num_bytes: int) -> str:
    """Return a size such as ``"11.2 GB"``."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{num_bytes:,} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
