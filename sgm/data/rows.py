"""The rows of a data set: a clip, wherever its bytes lie, with its caption."""

import io
import ntpath
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sgm.util import InputError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SHOWN = 5  # faults that a message lists


class Embedded(Protocol):
    """A clip inside another file. ``str()`` names it, with the suffix that tells a picture from a video."""

    @property
    def container(self) -> Path:
        """The file or folder that holds it."""
        ...

    def read(self) -> bytes:
        """Return its bytes, opening the container in this process."""
        ...


ClipFile = Path | Embedded


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a clip without decoding all of it.

    Attributes:
        num_frames: frames that are shown.
        fps: their mean rate; 0 for a single frame.
        duration: seconds from the first frame to the end of the last.
        height: in pixels, of the upright picture.
        width: in pixels, of the upright picture.
    """

    num_frames: int
    fps: float
    duration: float
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Row:
    """A clip of a data set.

    Attributes:
        path: the clip.
        caption: its caption, on one line.
        problem: why it cannot be trained on, else None.
        image: the picture that image-to-video starts from; None takes the first frame.
        info: what the data set itself says about the clip, unread.
    """

    path: ClipFile
    caption: str
    problem: str | None = None
    image: ClipFile | None = None
    info: VideoInfo | None = None


def suffix(file: str | ClipFile) -> str:
    """Return the suffix of a clip's name, in lower case."""
    return os.path.splitext(str(file))[1].lower()


def is_picture(file: str | ClipFile) -> bool:
    """Return whether a clip is a picture, that is, a video of one frame."""
    return suffix(file) in PICTURE_SUFFIXES


def opened(file: str | ClipFile) -> str | io.BytesIO:
    """Return what decoders open: a path, or the bytes of a clip that lies inside another file.

    Raises:
        OSError: the bytes cannot be read.
    """
    return str(file) if isinstance(file, str | Path) else io.BytesIO(file.read())


def one_line(text: str) -> str:
    """Return a caption without line breaks and repeated spaces."""
    return " ".join(text.split())


class Faults:
    """What is wrong with a description of a data set, collected so that several are told at once."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._found: list[str] = []

    def add(self, where: str, fault: str) -> None:
        """Note a fault; `where` is file and line."""
        self._found.append(f"{where}: {fault}")

    def refuse(self) -> None:
        """Report what was noted.

        Raises:
            InputError: there is a fault.
        """
        if self._found:
            listed = "\n".join(f"  {fault}" for fault in self._found[:_SHOWN])
            more = len(self._found) - _SHOWN
            listed += f"\n  and {more:,} more" if more > 0 else ""
            raise InputError(f"'{self.source}' cannot be used as a data set:\n{listed}")


class Files:
    """Which files there are below a folder, asked for one by one and looked up a folder at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, frozenset[str]] = {}

    def path(self, name: str) -> Path:
        """Return the file that a relative name means.

        Raises:
            ValueError: the name is empty, absolute, or leads out of the folder; the message says so.
        """
        return self.root / self.inside(name)

    def inside(self, name: str) -> str:
        """Return such a name without what is superfluous in it, or raise as `path` does."""
        if not name.strip():
            raise ValueError("names no file")
        if name.startswith(("/", "\\")) or ntpath.splitdrive(name)[0]:
            raise ValueError(f"'{name}' is an absolute path; give it relative to '{self.root}'")
        inside = os.path.normpath(name)
        if inside == os.pardir or inside.startswith(os.pardir + os.sep):
            raise ValueError(f"'{name}' leads out of '{self.root}'; move the file into that folder, or link it there")
        return inside

    def has(self, path: Path) -> bool:
        """Return whether there is such a file."""
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = frozenset(_names(folder))
        return name in self._names[folder]


def _names(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)
    except OSError:
        return
