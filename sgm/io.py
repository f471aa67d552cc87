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
_TEMPORARY = re.compile(r"(?s)\..+\.\d+-[0-9a-f]+(\.\w+)?")
_STEM_BYTES = 100  # of a file's name in its temporary name, which file systems limit to 255 bytes as well
_JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]|\d+', re.DOTALL)


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
    temporary = _temporary(path)
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


def require_writable(folder: str | Path, *names: str) -> None:
    """Check that `folder`, or its nearest existing parent, is a writable folder, and takes files of these names.

    Raises:
        InputError: it is not, or the file system does not take the names of files, or of folders to be made.
    """
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"'{folder}' cannot be written to: {existing} is no folder, or you may not write to it")
    try:
        # Looking up a name that is too long, or illegal, fails in another way than looking up one that is not there.
        for path in (*(existing / name for name in (*folder.relative_to(existing).parts, *names)), folder):
            _look_up(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        what = f"'{names[0]}' in " if names else ""
        raise InputError(f"{what}'{folder}' cannot be written to: {reason}; choose another name") from error
    try:
        with tempfile.TemporaryFile(dir=existing):  # permissions do not prove it: /proc, a full or read-only disk
            pass
    except OSError as error:
        raise InputError(f"'{folder}' cannot be written to: {existing}: {error.strerror}") from error


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON.

    Raises:
        RunError: the file could not be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(json_bytes(content, indent=2) + b"\n")


def json_bytes(content: Any, *, indent: int | None = None) -> bytes:
    """Return JSON in UTF-8, readable in any language.

    Bytes of file names that are not UTF-8 are escaped, and read back by `parse_json` as Python spells them in a path.
    """
    # A lone surrogate is always inside a string, where its escape by Python is that of JSON.
    return json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


class JSONError(ValueError):
    """Text is not JSON, or JSON that Python cannot hold.

    Attributes:
        line: of the fault, from 1.
        fault: what is wrong.
    """

    def __init__(self, line: int, fault: str) -> None:
        super().__init__(f"line {line}: {fault}")
        self.line, self.fault = line, fault


def parse_json(text: str | bytes) -> Any:
    """Return the content of a JSON text.

    Raises:
        JSONError: it is malformed or not UTF-8, nested too deeply, or holds a number of thousands of digits.
    """
    try:
        text = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
        return json.loads(text)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise JSONError(line, f"is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise JSONError(error.lineno, f"is not JSON: {error.msg} (column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # ValueError: too many digits
        assert isinstance(text, str), "it was decoded"
        raise excessive_json(text, nested=isinstance(error, RecursionError)) from error


def excessive_json(text: str, *, nested: bool) -> JSONError:
    """Return the fault of well-formed JSON that Python refuses: the deepest nesting, or else the longest number."""
    depth, worst, place = 0, 0, 0
    for token in _JSON_TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        size = depth if nested else len(token[0]) if token[0].isdigit() else 0
        if size > worst:
            worst, place = size, token.start()
    fault = f"nests lists or objects {worst:,} deep" if nested else f"holds a number of {worst:,} digits"
    return JSONError(text.count("\n", 0, place) + 1, f"{fault}, which no data of this program needs; correct the file")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of `atomic_file` left by a killed process; nothing may be writing to `folder`."""
    for path in folder.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Return a hidden name beside `path`; it is legal wherever that of `path` is."""
    stem = os.fsencode(path.stem)[:_STEM_BYTES].decode("utf-8", "ignore") or "_"
    suffix = path.suffix if len(path.suffix) <= 16 else ""  # a longer one selects no format
    return path.with_name(f".{stem}.{os.getpid()}-{secrets.token_hex(4)}{suffix}")


def _look_up(path: Path) -> None:
    """Raise an OSError or ValueError if the file system cannot hold a file of this name."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()


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
