"""Rows of a data set (clips with captions), and helpers for file names and faults."""

import io
import ntpath
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sgm.io import require_regular
from sgm.util import InputError

VIDEO_SUFFIXES = tuple(".mp4 .mov .mkv .webm .avi .m4v .mpg .mpeg .ts .flv .wmv .3gp .ogv".split())
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
_SHOWN = 5  # faults that a message lists


class Embedded(Protocol):
    """A clip inside another file. ``str()`` is its name, with the suffix of a picture or video."""

    @property
    def container(self) -> Any:
        """The file or folder that contains it: a path, or an object afar with a ``stamp``."""
        ...

    def read(self) -> bytes:
        """Return its bytes, opening the container in this process."""
        ...


ClipFile = Path | Embedded


@dataclass(frozen=True)
class VideoInfo:
    """Metadata of a clip, with the rotation applied."""

    num_frames: int
    fps: float  # mean rate; 0 for a single frame
    duration: float  # in seconds, from the start of the first frame to the end of the last
    height: int  # in pixels
    width: int


@dataclass(frozen=True, slots=True)
class Row:
    """A clip of a data set."""

    path: ClipFile
    caption: str  # on one line
    problem: str | None = None  # why it cannot be used
    image: ClipFile | None = None  # first image of image-to-video; None is the first frame
    info: VideoInfo | None = None  # metadata in the columns of the data set, not yet checked
    rejected: ClipFile | None = None  # a clip of the same caption, to which this one is preferred
    control: ClipFile | None = None  # clip that shows the network what to follow, frame by frame
    mask: ClipFile | None = None  # clip or picture, white where the loss counts


def suffix(file: str | ClipFile) -> str:
    """Return the suffix of a clip's name, in lower case."""
    return os.path.splitext(str(file))[1].lower()


def is_picture(file: str | ClipFile) -> bool:
    """Return whether a clip is a picture file, a video of one frame."""
    return suffix(file) in PICTURE_SUFFIXES


def opened(file: str | ClipFile) -> str | io.BytesIO:
    """Return the input of decoders: an absolute path, or the bytes of an embedded clip.

    FFmpeg would take a relative name with a colon for a URL.

    Raises:
        OSError: the bytes cannot be read.
    """
    return os.path.abspath(file) if isinstance(file, str | Path) else io.BytesIO(file.read())


def require_file(file: str | ClipFile) -> None:
    """Check that a clip is a file, if it is not inside of one, as `sgm.io.require_regular` does.

    Raises:
        NotAFileError: it is a pipe, socket, device or folder.
        OSError: it does not exist, or may not be reached.
    """
    if isinstance(file, str | Path):
        require_regular(file)


def one_line(text: str) -> str:
    """Return text without line breaks and repeated spaces."""
    return " ".join(text.split())


def caption_of(text: str) -> str:
    """Return a caption on one line; empty if no character of it is visible, such as U+200B."""
    text = one_line(text)
    return text if any(unicodedata.category(each)[0] not in "CZ" for each in text) else ""


class Faults:
    """Collects faults of a data set, to report them together."""

    def __init__(self, source: object) -> None:
        self.source = source
        self._found: list[str] = []

    def add(self, where: str, fault: str) -> None:
        """Add a fault; `where` is file and line."""
        self._found.append(f"{where}: {fault}")

    def extend(self, others: "Iterable[Faults]") -> None:
        """Add the faults of parts of the data set."""
        for other in others:
            self._found += other._found

    def refuse(self) -> None:
        """Raise an InputError if there is a fault."""
        if self._found:
            raise InputError(f"'{self.source}' cannot be used as a data set:\n{listed(self._found, shown=_SHOWN)}")


def listed(lines: Sequence[str], shown: int = 10) -> str:
    """Return indented lines for a message: the first ones, and the number of the rest."""
    more = [f"  and {len(lines) - shown:,} more"] if len(lines) > shown else []
    return "\n".join([*(f"  {line}" for line in lines[:shown]), *more])


class Files:
    """The files below a folder; each folder is listed once."""

    def __init__(self, root: object) -> None:
        self.root = root
        self._names: dict[str, frozenset[str]] = {}

    def path(self, name: str) -> Path:
        """Return the path of a relative name.

        Raises:
            ValueError: the name is empty, absolute, or outside of the folder.
        """
        path = Path(str(self.root)) / self.inside(name)
        # A colon or backslash is legal here, and a sign of a list written on Windows.
        if (name.startswith("\\") or ntpath.splitdrive(name)[0]) and not self.has(path):
            raise ValueError(_absolute(name, self.root))
        return path

    def inside(self, name: str) -> str:
        """Return a relative name in normal form, or raise as `path` does."""
        if not name.strip() or "\0" in name:
            raise ValueError("names no file")
        if os.path.isabs(name):
            raise ValueError(_absolute(name, self.root))
        inside = os.path.normpath(name)
        if inside == os.pardir or inside.startswith(os.pardir + os.sep):
            raise ValueError(f"'{name}' leads out of '{self.root}'; move the file into that folder, or link it there")
        return inside

    def has(self, path: Path) -> bool:
        """Return whether there is such a file; a link that leads nowhere is none."""
        folder, name = os.path.split(path)
        return name in self.names(folder)

    def names(self, folder: str) -> frozenset[str]:
        """Return the names of the files in a folder, as `has` finds them; none if there is no such folder."""
        if folder not in self._names:
            try:
                with os.scandir(folder or os.curdir) as entries:
                    self._names[folder] = frozenset(
                        each.name for each in entries if not each.is_symlink() or os.path.exists(each.path)
                    )
            except PermissionError:
                raise
            except (OSError, ValueError):  # missing, or a name that no file system takes
                self._names[folder] = frozenset()
        return self._names[folder]


def _absolute(name: str, root: object) -> str:
    return f"'{name}' is an absolute path; give it relative to '{root}'"
