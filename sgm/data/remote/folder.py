"""A folder of a cache afar: files by name, tensors of its shards by range; and a folder here copied there."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from sgm.data.remote.objects import THREADS, MissingError, RemoteFile, filesystem, look_up, retried
from sgm.data.remote.store import Store
from sgm.io import parse_json
from sgm.log import get_logger

logger = get_logger(__name__)


class RemoteFolder:
    """The files below a URL; each is looked up once, and what is read of them kept in `store`."""

    is_remote = True

    def __init__(self, url: str, store: Store) -> None:
        self.url, self.store = url.rstrip("/"), store
        self._files: dict[str, RemoteFile | None] = {}

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    def __truediv__(self, name: str) -> str:
        """Return the URL of a file, for messages."""
        return f"{self.url}/{name}"

    def look_up(self, names: Iterable[str]) -> None:
        """Look up files, several at a time.

        Raises:
            RemoteError: the folder cannot be reached.
        """
        new = [name for name in names if name not in self._files]
        with ThreadPoolExecutor(THREADS) as pool:
            self._files |= zip(new, pool.map(self._looked_up, new), strict=True)

    def _looked_up(self, name: str) -> RemoteFile | None:
        try:
            return look_up(f"{self.url}/{name}", self.store)
        except MissingError:
            return None

    def among(self, names: Iterable[str]) -> set[str]:
        """Return the names of files that are there; raises as `look_up` does."""
        self.look_up(names := [*names])
        return {name for name in names if self._files[name] is not None}

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: there is none.
            RemoteError: it cannot be read.
        """
        found = self._file(name)
        return found.read(0, found.size)

    def size(self, name: str) -> int:
        """Return the bytes of a file; raises as `read` does."""
        return self._file(name).size

    def header(self, name: str) -> bytes:
        """Return the JSON in the header of a safetensors file; raises as `read` does."""
        file = self._file(name)
        length = int.from_bytes(file.read(0, min(8, file.size)), "little")
        return file.read(8, max(0, min(length, file.size - 8)))

    def tensors(self, name: str, header: bytes) -> "RemoteTensors":
        """Return the tensors of a safetensors file; raises as `read` does."""
        return RemoteTensors(self._file(name), header)

    def _file(self, name: str) -> RemoteFile:
        self.look_up([name])
        if (found := self._files[name]) is None:
            raise FileNotFoundError(f"{self.url}/{name}")
        return found


class RemoteTensors:
    """The tensors of a safetensors file afar, as `safetensors.safe_open` gives those of a file here."""

    def __init__(self, file: RemoteFile, raw: bytes) -> None:
        self._file, self._header, self._start = file, parse_json(raw), 8 + len(raw)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        entry = self._header[name]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        header = json.dumps({name: {**entry, "data_offsets": [0, size]}}).encode()
        return load(len(header).to_bytes(8, "little") + header + self._file.read(*self._place(name)))[name]

    def prefetch(self, name: str) -> None:
        """Read what `get_tensor` will."""
        self._file.prefetch(*self._place(name))

    def _place(self, name: str) -> tuple[int, int]:
        start, stop = self._header[name]["data_offsets"]
        return self._start + start, stop - start


def remove(there: RemoteFolder, names: Iterable[str]) -> None:
    """Remove those of some files that are at a URL.

    Raises:
        RemoteError: one cannot be removed.
    """
    for name in there.among(names):
        url = f"{there.url}/{name}"

        def work(url: str = url) -> None:
            system, target = filesystem(url)
            system.rm_file(target)
            system.invalidate_cache()

        retried(url, there.store.retries, work)


def upload(folder: Path, there: RemoteFolder, groups: Sequence[Sequence[str]], same: Callable[[str], bool]) -> int:
    """Copy files to a URL, group after group, those that are not there yet; return the number of copied ones.

    Args:
        folder: of the files.
        there: the folder that they are copied to.
        groups: names of files; the last group marks that all is there.
        same: whether a file there has the content of the one here.

    Raises:
        RemoteError: it cannot be written.
    """

    def copy(name: str) -> bool:
        if there.among([name]) and same(name):
            return False

        def work() -> None:
            system, target = filesystem(f"{there.url}/{name}")
            system.makedirs(system._parent(target), exist_ok=True)  # object stores have no folders to make
            system.put_file(str(folder / name), target)
            system.invalidate_cache()
            if (size := system.info(target)["size"]) != (folder / name).stat().st_size:
                raise OSError(f"{size:,} bytes arrived")

        retried(f"{there.url}/{name}", there.store.retries, work)
        logger.info("copied %s to %s", folder / name, there.url)
        return True

    copied: list[Any] = []
    for names in groups:
        there.look_up(names)
        with ThreadPoolExecutor(THREADS) as pool:
            copied += pool.map(copy, names)
    return sum(copied)
