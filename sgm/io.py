"""Atomic writes of files and folders, what killed writers left, locks, JSON, readable sizes, and missing permissions.

What is half written has a hidden name beside its output, and is locked by the process that writes it. The kernel drops
the lock of a dead process, however it died, so the next writer to that folder knows what it may remove.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from safetensors import SafetensorError

from sgm.log import get_logger
from sgm.urls import is_url, redacted
from sgm.util import InputError, RunError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

logger = get_logger(__name__)

# The names of what is half written: hidden, with process number and random digits.
_TEMPORARY = re.compile(r"(?s)\..+\.\d+-[0-9a-f]+(\.[^.]+)?")
_STEM_BYTES = 100  # of a file's name in its temporary name, which file systems limit to 255 bytes as well
_JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]|\d+', re.DOTALL)
_ONE_SLASH = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")  # with more letters than a drive has
_JSON_COLON = re.compile(r"\s*:")
_NOT_FILES = {stat.S_ISFIFO: "named pipe", stat.S_ISSOCK: "socket", stat.S_ISDIR: "folder"}
LOCK = ".lock"  # the locked file of a folder
_HIDDEN_LOCK = "lock"  # that of a hidden folder
_cleaned: set[Path] = set()  # folders whose leftovers this process has removed
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("your disk quota is used up", "free some space"),
    errno.EROFS: ("the file system is read-only", "mount it for writing"),
}


class WriteError(RunError):
    """A file could not be written; another folder may help. Exit code 2 if permissions are the reason, else 1."""


class OutputError(InputError):
    """An output cannot be where it was asked for; another folder helps."""


@contextlib.contextmanager
def atomic_file(path: str | Path, *, need_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; after the block, flush the file to disk and rename it to `path`.

    If the block fails, `path` is unchanged and the temporary file is removed. The temporary name is hidden and keeps
    the suffix, which selects the format in many writers. Missing folders are created.

    Args:
        path: the file to write or replace.
        need_bytes: its size, if known, for the disk-full message.

    Raises:
        RunError: the folder cannot be written to, the disk is full, or `path` is a folder or too large.
    """
    path = Path(path)
    temporary, lock = path, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (folder := path.parent.absolute()) not in _cleaned:
            remove_leftovers(folder)
            _cleaned.add(folder)
        while lock is None:
            temporary = _temporary(path)
            lock = _hold(temporary)
        mode = stat.S_IMODE(os.fstat(lock).st_mode)
        yield temporary
        # Some writers replace the file by a private one (safetensors: 0600). os.umask can only be asked by changing it,
        # for all threads.
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except InputError:
        raise
    # torch.save reports a full disk as a RuntimeError, and a RunError may be that of an encoder whose disk is full.
    except (OSError, RuntimeError, SafetensorError) as error:
        number = None if lock is None else _failure_of(lock)
        if isinstance(error, RunError) and number is None:
            raise
        if lock is not None:  # before the free space is measured; open descriptors keep the space of an unlinked file
            os.ftruncate(lock, 0)
            temporary.unlink(missing_ok=True)
        failure = _write_failure(path, error, number, need_bytes)
        if isinstance(error, PermissionError):
            failure.exit_code = InputError.exit_code
        raise failure from error
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            os.close(lock)


@contextlib.contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder of the name of `path`, to be renamed to it, in a locked hidden folder beside it.

    The hidden folder is removed after the block, with what is still in it.

    Raises:
        OSError: it cannot be made.
    """
    hidden, lock = path, None
    while lock is None:
        hidden = _temporary(path)
        hidden.mkdir(parents=True)
        with contextlib.suppress(FileNotFoundError):  # another process took the empty folder for a leftover
            lock = _hold(hidden / _HIDDEN_LOCK)
    try:
        (hidden / path.name).mkdir()
        yield hidden / path.name
    finally:
        _remove(hidden)
        os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Remove what dead processes left half written in `folder`; what a living process has locked stays.

    Nothing is removed on a file system without locks, nor where this process may not.
    """
    with contextlib.suppress(OSError):
        for path in [Path(entry) for entry in os.scandir(folder) if _TEMPORARY.fullmatch(entry.name)]:
            _remove_if_dead(path)


def _temporary(path: Path) -> Path:
    """Return a hidden name beside `path`; it is legal wherever that of `path` is."""
    stem = os.fsencode(path.stem)[:_STEM_BYTES].decode("utf-8", "ignore") or "_"
    suffix = path.suffix if len(path.suffix) <= 16 else ""  # a longer one selects no format
    return path.with_name(f".{stem}.{os.getpid()}-{secrets.token_hex(4)}{suffix}")


def _hold(path: Path) -> int | None:
    """Create and lock a file until the returned descriptor is closed; None if it was taken for a leftover meanwhile."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    with contextlib.suppress(OSError):  # without locks on its file system it is never removed by another process
        flock(handle)
    if path.exists():
        return handle
    os.close(handle)
    return None


def _remove_if_dead(path: Path) -> None:
    locked = path / _HIDDEN_LOCK if path.is_dir() else path
    with contextlib.suppress(OSError):  # locked, gone, on a file system without locks, or not this user's
        if not locked.exists():
            path.rmdir()  # killed before it was locked; fails if there is something in it
            return
        handle = os.open(locked, os.O_RDWR)
        try:
            flock(handle, wait=False)
            _remove(path)
            logger.info("removed %s, which a process that has ended left half written", path)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    """Remove a file, or a hidden folder with its lock last, so that a killed removal can be finished."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for inner in path.iterdir():
        if inner.name != _HIDDEN_LOCK:
            shutil.rmtree(inner, ignore_errors=True)
    with contextlib.suppress(OSError):
        (path / _HIDDEN_LOCK).unlink(missing_ok=True)
        path.rmdir()


def flock(handle: int, *, wait: bool = True) -> None:
    """Lock an open file or folder against other processes until it is closed; the kernel does so for dead ones.

    Args:
        handle: its descriptor.
        wait: until another process has unlocked it.

    Raises:
        BlockingIOError: another process has locked it, and `wait` is not set.
        OSError: this file system or system has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_folder(folder: Path, *, cure: str) -> IO[str] | None:
    """Lock `folder` against other processes until the returned file is closed or this process ends.

    A killed launcher may leave its workers running. If the file system has no locks, only warn.

    Args:
        folder: gets a file `LOCK`.
        cure: for the message, what else to do than to end the other process.

    Raises:
        InputError: another process holds the lock.
    """
    try:
        file = try_lock_folder(folder)
    except BlockingIOError as error:
        owner = (folder / LOCK).read_text(encoding="utf-8").strip() or "unknown"
        raise InputError(
            f"{folder} is in use by process {owner} (a launcher that was killed may have left it); end that process, "
            f"or {cure}"
        ) from error
    except PermissionError as error:
        raise InputError(denied_text(error)) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s); see that no other process works there", folder, error)
        return None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def try_lock_folder(folder: Path) -> IO[str]:
    """Return the locked file `LOCK` of a folder.

    Raises:
        OSError: see `flock`; or the file may not be written.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        flock(file.fileno(), wait=False)
        if not os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
            raise BlockingIOError(errno.EWOULDBLOCK, "another process has replaced the file", str(folder / LOCK))
    except OSError:
        file.close()
        raise
    # Close the file in forked workers, which would keep the lock. Weakly referenced, so that dropping it closes it.
    held = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: (here := held()) is not None and here.close())
    return file


def require_writable(folder: str | Path, *files: str) -> None:
    """Check that `folder` can be made and written to, and takes `files`.

    Args:
        folder: the output.
        files: their names in it, or paths in folders to be made there.

    Raises:
        OutputError: it cannot; the message names the file that fails.
    """
    folder = Path(folder).absolute()
    probed: set[Path] = set()
    for target in dict.fromkeys([folder, *((folder / file).parent for file in files)]):
        existing = next(path for path in (target, *target.parents) if os.path.lexists(path))
        if existing not in probed:
            _probe(target, existing)
            probed.add(existing)
    existing = next(path for path in (folder, *folder.parents) if os.path.isdir(path))
    for file in ("", *files):
        path = folder / file
        try:
            # Looking up a name that is too long or illegal fails in another way than looking up one that is not there.
            for part in path.relative_to(existing).parts:
                _look_up(existing / part)
            _look_up(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            what = f"'{file}' in " if file else ""
            raise OutputError(f"{what}'{folder}' cannot be written to: {reason}; choose another name") from error


def _probe(folder: Path, existing: Path) -> None:
    """Raise OutputError if a file cannot be written to `existing`: `folder`, or its nearest existing parent."""
    if not existing.is_dir():
        raise OutputError(f"'{folder}' cannot be written to: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"'{folder}' cannot be written to: you may not write to {existing} (right 'w'), or its file system is "
            "read-only; correct that, or choose another folder"
        )
    try:
        with tempfile.TemporaryFile(dir=existing):  # permissions do not prove it: /proc, a full or read-only disk
            pass
    except OSError as error:
        raise OutputError(
            f"'{folder}' cannot be written to: {existing}: {error.strerror}; choose another folder"
        ) from error


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON.

    Raises:
        RunError: the file could not be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(json_bytes(content, indent=2) + b"\n")


def require_own_json(path: Path, key: str) -> None:
    """Refuse to replace a JSON file of others, such as a table of clips: an own one begins with the key `key`.

    Raises:
        InputError: it is a folder, or another file.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    if path.is_file():
        with path.open("rb") as file:
            if not re.match(rb'\s*{\s*"%s"' % key.encode(), file.read(200)):
                raise InputError(f"{path} exists and was not written by this command; name another file, or remove it")


def json_bytes(content: Any, *, indent: int | None = None) -> bytes:
    """Return JSON in UTF-8, readable in any language.

    Bytes of file names that are not UTF-8 are escaped, and read back by `parse_json` as Python spells them in a path.
    """
    # A lone surrogate is always inside a string, where its escape by Python is that of JSON.
    return json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def as_unicode(text: str) -> str:
    """Return text in which bytes of file names that are not UTF-8 are escaped, for readers that refuse them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class JSONError(ValueError):
    """Text is not JSON, or JSON that Python cannot hold.

    Attributes:
        line: of the fault, from 1.
        fault: what is wrong.
    """

    def __init__(self, line: int, fault: str) -> None:
        super().__init__(f"line {line}: {fault}")
        self.line, self.fault = line, fault


class NotAFileError(OSError):
    """A path names something else than a file."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"it is a {kind}, not a file")


def require_regular(path: str | Path) -> None:
    """Check that a path names a file, without opening it: a pipe may keep a reader waiting, and a device never ends.

    Raises:
        NotAFileError: it is a pipe, socket, device or folder.
        OSError: it does not exist, or may not be reached.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise NotAFileError(next((name for check, name in _NOT_FILES.items() if check(mode)), "device"))


def require_local(path: str | Path) -> None:
    """Refuse a URL or a hub's cache of a model, whose files are in folders of it, in the place of a path of weights.

    Raises:
        InputError: it is a URL, also with the single slash that `Path` leaves of two, or such a cache.
    """
    text = _ONE_SLASH.sub(r"\1://", str(path))
    if is_url(text) and not os.path.lexists(path):
        raise InputError(f"{redacted(text)} is a URL, and weights are read from files; download it first")
    snapshots = Path(path, "snapshots")
    if os.path.isdir(snapshots) and any(os.path.isdir(snapshots.with_name(name)) for name in ("blobs", "refs")):
        found = ", ".join(str(snapshots / name) for name in sorted(os.listdir(snapshots))) or "and there is none"
        raise InputError(f"{path} is a cache of downloads, not a model; give a snapshot in it: {found}")


def content_digest(path: str | Path, *, whole: int = 1 << 26, ends: int = 1 << 20, pieces: int = 1024) -> str:
    """Return 16 hexadecimal digits of what a file holds, or of all files in a folder, without those in its subfolders.

    It does not depend on names of the path or on times.

    Args:
        path: the file or folder.
        whole: size in bytes up to which a file is read whole. Of a larger one count its size and:
        ends: bytes at both ends; a MiB holds the checksums of all entries of an archive of weights.
        pieces: pages evenly between.

    Raises:
        OSError: something cannot be read.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith(".")):
            each = content_digest(file, whole=whole, ends=ends, pieces=pieces)
            digest.update(f"{file.name}|{each}|".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]
    require_regular(path)
    with path.open("rb") as file:
        return range_digest(file, 0, os.fstat(file.fileno()).st_size, whole=whole, ends=ends, pieces=pieces)


def range_digest(file: BinaryIO, start: int, size: int, *, whole: int, ends: int, pieces: int) -> str:
    """Return `content_digest` of `size` bytes of an open file, such as those of a file in an archive."""
    digest = hashlib.sha256()
    between = (ends + (size - 2 * ends) * index // pieces for index in range(pieces))
    places = ((0, ends), (size - ends, ends), *((place, 4096) for place in between)) if size > whole else ((0, size),)
    if size > whole:
        digest.update(f"{size}|".encode())
    for place, count in places:
        file.seek(start + place)
        digest.update(file.read(count))
    return digest.hexdigest()[:16]


class _RepeatedKeyError(Exception):
    """An object of a JSON text has a key twice."""


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """Return the content of a JSON text.

    Args:
        text: the JSON.
        unique: refuse a key that an object has twice; otherwise the last value counts, as in most programs.

    Raises:
        JSONError: it is malformed or not UTF-8, nested too deeply, or holds a number of thousands of digits.
    """
    try:
        text = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
        return json.loads(text, object_pairs_hook=_unique_keys if unique else None)
    except _RepeatedKeyError:
        raise _repeated_key(str(text)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise JSONError(line, f"is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise JSONError(error.lineno, f"is not JSON: {error.msg} (column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # ValueError: too many digits
        assert isinstance(text, str), "it was decoded"
        raise excessive_json(text, nested=isinstance(error, RecursionError)) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise _RepeatedKeyError
    return content


def _repeated_key(text: str) -> JSONError:
    """Return the fault of JSON, well-formed up to there, of which an object has a key twice."""
    keys: list[set[str]] = []  # of the lists and objects that are open
    for token in _JSON_TOKEN.finditer(text):
        if token[0] in ("[", "{"):
            keys.append(set())
        elif token[0] in ("]", "}"):
            keys.pop()
        elif token[0][0] == '"' and _JSON_COLON.match(text, token.end()):
            key = json.loads(token[0]) if "\\" in token[0] else token[0][1:-1]
            if key in keys[-1]:
                line = text.count("\n", 0, token.start()) + 1
                return JSONError(line, f"names the key '{key[:60]}' twice in an object; remove one")
            keys[-1].add(key)
    raise AssertionError("the parser found one")


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


def _failure_of(lock: int) -> int | None:
    """Return the error number of writing to a file, found by trying, since libraries hide it; None if it works."""
    try:
        os.lseek(lock, 0, os.SEEK_END)
        for _ in range(2):  # the first may write a part
            os.write(lock, bytes(1 << 16))
        os.fsync(lock)
    except OSError as error:
        return error.errno
    return None


def _write_failure(path: Path, error: BaseException, number: int | None, need_bytes: int | None) -> RunError:
    """Return the error for a failed write, with the bytes needed and free."""
    if isinstance(error, PermissionError):
        return WriteError(f"could not write {path}: {denied_text(error)}, or choose another folder")
    if isinstance(error, OSError) and error.errno in _REASONS:
        number = error.errno
    if path.is_dir():
        return RunError(f"could not write {path}: it is a folder; remove it, or choose another name")
    needs = f"it needs {readable_size(need_bytes)}, " if need_bytes else ""
    if errno.EFBIG in (number, getattr(error, "errno", None)):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit == resource.RLIM_INFINITY:
            return WriteError(f"could not write {path}: it is too large for its file system; choose another folder")
        said = f"{needs}the limit of a file here is {readable_size(limit)}"
        return RunError(f"could not write {path}: {said}; raise it (ulimit -f)")
    existing = next((p for p in path.parents if p.is_dir()), Path("."))
    free = f"{needs}{readable_size(shutil.disk_usage(existing).free)} are free there"
    if number is None:
        cure = "free some space, correct the permissions, or choose another folder"
        return WriteError(f"could not write {path}: {error}; {free}; {cure}")
    reason, cure = _REASONS.get(number, (os.strerror(number), "correct that"))
    said = "" if reason == os.strerror(number) else f" ({os.strerror(number)})"
    return WriteError(f"could not write {path}: {reason}{said}; {free}; {cure}, or choose another folder")


def reason_of(error: Exception) -> str:
    """Return what an error says; of the system's errors, without number and path, which messages name themselves."""
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def refusing_denied() -> Iterator[None]:
    """Context: turn a PermissionError into an InputError that names the path and the missing right."""
    try:
        yield
    except PermissionError as error:
        raise InputError(denied_text(error)) from error


def denied_text(error: PermissionError) -> str:
    """Return the path of a PermissionError and the right that is missing, with the cure."""
    if error.filename is None:
        return f"{error.strerror or error}; ask the owner of the file for the right"
    path = Path(os.fsdecode(error.filename)).absolute()
    for folder in reversed(path.parents):
        if not os.access(folder, os.X_OK):
            return f"{path}: you may not enter the folder {folder} (right 'x'); its owner can allow it with chmod"
    folder, kind = path.is_dir(), "folder" if path.is_dir() else "file"
    if path.exists() and not os.access(path, os.R_OK | (os.X_OK if folder else 0)):
        return f"{path}: you may not read this {kind} (right 'r'); its owner can allow it with chmod"
    target = path if path.exists() and not os.access(path, os.W_OK) else path.parent
    return f"{target}: you may not write there (right 'w'); its owner can allow it with chmod"


def readable_size(num_bytes: int) -> str:
    """Return a size such as ``"11.2 GB"``."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{num_bytes:,} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
