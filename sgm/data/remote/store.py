"""What was read from afar, kept in a folder of this machine: never more bytes than its bound, the latest used ones.

Any number of processes may use the folder. What is read waits under the lock of its entry, so that it is read once; an
entry appears complete, by a rename. Under the lock of the sum, an entry that is to be read takes its size at once: a
hidden file of that size. Where the sum would pass the bound, the entries that were used longest ago are removed; who
has one open reads on. Where those that are just being read leave no room, it waits for them.
"""

import contextlib
import hashlib
import inspect
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sgm.io import atomic_file, flock, readable_size, remove_leftovers
from sgm.urls import is_url
from sgm.util import InputError, RunError, get_obj_from_str

KEY = "args.remote_cache_gb"
_SPARE = 10  # a tenth of the bound is free after entries are removed, so that the folder is seldom listed
_TRIES = 20  # times that an entry may be removed between its arrival and its use
_PAUSE_S, _PATIENCE_S = 0.05, 600  # between looks for room, and while no entry arrives


class RemoteError(RunError):
    """An object afar cannot be read or written: the message has the URL, the cause and the cure."""


class RefusedError(RemoteError, InputError):
    """The same, where trying again does not help: something given is wrong."""

    exit_code = InputError.exit_code


class MissingError(RefusedError):
    """There is no such object."""


def default_folder() -> Path:
    """Return the folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogvideox-sat" / "remote"


@dataclass(frozen=True)
class Store:
    """A folder of entries.

    Attributes:
        folder: on a disk of this machine.
        max_bytes: bound of the sum of the entries.
        retries: how often a request that failed is repeated.
    """

    folder: Path = field(default_factory=default_folder)
    max_bytes: int = 50 * 10**9
    retries: int = 5

    def open(self, key: str, size: int, fetch: Callable[[Path], None]) -> BinaryIO:
        """Return an entry, open.

        Args:
            key: names its content, whatever that depends on.
            size: in bytes.
            fetch: writes the content into a file that is there, if no process has yet.

        Raises:
            RunError: it cannot be written, or what `fetch` raises.
            RefusedError: it is larger than the bound.
        """
        path = self._path(key)
        for _ in range(_TRIES):
            try:
                file = path.open("rb")
                if os.fstat(file.fileno()).st_size == size:
                    os.utime(path)
                    return file
                file.close()
                path.unlink(missing_ok=True)  # cut by a disk or a hand: it is read again
            except FileNotFoundError:
                pass
            with self.locked(path.name[:3]):
                if not path.exists():
                    with atomic_file(path, need_bytes=size) as temporary:
                        self._reserve(size, temporary)
                        fetch(temporary)
        raise RunError(f"{path} was removed {_TRIES} times before it was read; raise {KEY}")

    def has(self, key: str) -> bool:
        """Return whether an entry is there."""
        return self._path(key).exists()

    def free(self) -> int:
        """Return the bytes that entries can take: those free on the disk, and those of the entries there."""
        folder = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        used = sum(path.stat().st_size for path in self.folder.glob("entries/*/[!.]*"))
        return shutil.disk_usage(folder).free + used

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()[:40]
        return self.folder / "entries" / name[:2] / name

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Context: no other process or thread is in it with the same name."""
        locks = self.folder / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            handle = os.open(locks / name, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            cure = "name another folder with args.remote_cache"
            raise RefusedError(f"{locks} cannot be written to: {error.strerror}; {cure}") from error
        try:
            with contextlib.suppress(OSError):  # without locks, entries may be read twice; they stay whole
                flock(handle)
            yield
        finally:
            os.close(handle)

    def _reserve(self, size: int, temporary: Path) -> None:
        """Make room for `size` bytes, and let `temporary` take them."""
        if size > self.max_bytes:
            raise RefusedError(
                f"{KEY} is {self.max_bytes / 1e9:g} GB, and one object needs {readable_size(size)}; raise it, or "
                "write smaller shards"
            )
        before, since = -1, time.monotonic()
        while (used := self._taken(size, temporary)) is not None:
            if used != before:
                before, since = used, time.monotonic()
            if time.monotonic() - since > _PATIENCE_S:
                raise RunError(
                    f"what is being read into {self.folder / 'entries'} takes {readable_size(used)}, and nothing "
                    f"arrived for {_PATIENCE_S} s; raise {KEY}, or delete the folder while nothing runs"
                )
            time.sleep(_PAUSE_S)

    def _taken(self, size: int, temporary: Path) -> int | None:
        """Let `temporary` take `size` bytes, and return None; where there is no room for them, the bytes in use."""
        noted = self.folder / "used"
        with self.locked("sum"):
            used = int(text) if noted.is_file() and (text := noted.read_text()).isdigit() else self.max_bytes
            if used + size > self.max_bytes:
                used = self._remove_oldest(self.max_bytes - size)
            if used + size > self.max_bytes:
                return used
            os.truncate(temporary, size)
            noted.write_text(str(used + size))
            return None

    def _remove_oldest(self, most: int) -> int:
        """Remove entries until there are at most `most` bytes, and some less if any is removed; return the bytes."""
        for folder in (self.folder / "entries").iterdir():
            remove_leftovers(folder)
        found = [path for path in (self.folder / "entries").glob("*/*") if path.is_file()]
        files = []
        for path in found:
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile: its bytes are those of its new name
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        used = sum(size for _, size, _ in files)
        if used <= most:
            return used
        for _, size, path in sorted(files):
            if used <= most - most // _SPARE:
                break
            if not path.name.startswith("."):
                path.unlink(missing_ok=True)
                used -= size
        return used


def make_store(folder: str | None, gigabytes: float, retries: int) -> Store:
    """Return the store of ``args.remote_cache``, ``remote_cache_gb`` and ``remote_retries``."""
    path = default_folder() if folder is None else Path(folder).expanduser()
    return Store(path.absolute(), int(gigabytes * 1e9), retries)


def store_param(section: Mapping[str, Any], data_dir: str, store: Store) -> dict[str, Store]:
    """Return the parameter `store` for the data set of a section, if `data_dir` is a URL and its class takes one."""
    if not is_url(data_dir) or "target" not in section:
        return {}
    return {"store": store} if "store" in inspect.signature(get_obj_from_str(section["target"])).parameters else {}
