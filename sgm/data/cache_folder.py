"""Folders of a cache: one interface for a folder here and one behind a URL."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open

from sgm.data.remote.folder import RemoteFolder
from sgm.data.remote.store import Store
from sgm.urls import is_url, local_path
from sgm.weights.checksums import read_header


class CacheFolder(Protocol):
    """Files by name. What reads a file raises FileNotFoundError if there is none, RemoteError if it is out of reach.

    Attributes:
        is_remote: whether it is behind a URL.
    """

    is_remote: bool

    def __truediv__(self, name: str) -> Path | str:
        """Return path or URL of a file."""
        ...

    def among(self, names: Iterable[str]) -> set[str]:
        """Return the names of files that are there; they are looked up together."""
        ...

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        ...

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        ...

    def header(self, name: str) -> bytes:
        """Return the JSON in the header of a safetensors file."""
        ...

    def tensors(self, name: str, header: bytes) -> Any:
        """Return the tensors of a safetensors file, whose header was read, as `safetensors.safe_open` does.

        Those of a remote file can be read ahead: ``prefetch(name)``.
        """
        ...


class LocalFolder:
    """A folder here, which need not exist."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def among(self, names: Iterable[str]) -> set[str]:
        """Return the names of files that are there."""
        there = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        return there.intersection(names)

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return (self.path / name).stat().st_size

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return (self.path / name).read_bytes()

    def header(self, name: str) -> bytes:
        """Return the JSON in the header of a safetensors file."""
        return read_header(self.path / name)

    def tensors(self, name: str, header: bytes) -> Any:
        """Memory-map the tensors of a safetensors file."""
        return safe_open(self.path / name, framework="pt")


def cache_folder(place: str | Path, store: Store | None = None) -> CacheFolder:
    """Return the folder at a path or URL; `store` keeps what is read from a URL, None is that of the user's cache."""
    return RemoteFolder(str(place), store or Store()) if is_url(place) else LocalFolder(local_path(place))
