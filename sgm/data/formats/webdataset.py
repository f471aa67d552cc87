"""WebDataset archives: tar files in which the files of a sample share a name up to its first dot.

In names like ``take 1.5x.mp4`` the dot belongs to the name: see `_split_names`. Suffixes are read in lower case.

Archives are not unpacked: decoding processes read members at their offset, of archives behind a URL too.
"""

import contextlib
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sgm.data.formats.manifest import CAPTION_NAMES, Columns, Table
from sgm.data.remote.objects import THREADS, RemoteFile, each_looked_up, expanded
from sgm.data.remote.store import Store
from sgm.data.remote.tar_index import members_of
from sgm.data.rows import PICTURE_SUFFIXES, VIDEO_SUFFIXES, Faults, Files, require_file
from sgm.data.tar import ArchiveError, files_of, refuse_compressed
from sgm.io import JSONError, parse_json, reason_of
from sgm.util import InputError

Archive = Path | RemoteFile


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive."""

    container: Archive
    name: str
    offset: int  # of its first byte
    size: int  # in bytes

    def __str__(self) -> str:
        """Return archive and name."""
        return f"{self.container}/{self.name}"

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            OSError: the archive cannot be read.
        """
        if isinstance(self.container, RemoteFile):
            return self.container.read(self.offset, self.size)
        with self.container.open("rb") as archive:
            return self.read_from(archive)

    def read_from(self, archive: BinaryIO) -> bytes:
        """Return its bytes from the open archive."""
        archive.seek(self.offset)
        return archive.read(self.size)


def read_archives(path: Path | str, columns: Columns, store: Store | None = None) -> Table:
    """Read one tar file, or those of a folder or URL, as a table; columns are file suffixes and keys of JSON files.

    A caption is a text file, or the value of a key.

    Args:
        path: a file or folder, or a URL as text.
        columns: names of the columns.
        store: that keeps what is read from a URL; None is that of the user's cache.

    Raises:
        InputError: there is no archive, or one is damaged, compressed, or has duplicate files.
        RemoteError: a URL cannot be read.
    """
    if isinstance(path, str):
        store = store or Store()
        archives: Sequence[Archive] = each_looked_up(expanded(path, store.retries), store)
    elif path.is_dir():
        archives = tar_files(path)
        refuse_compressed(path, (each.name for each in path.iterdir()))
    else:
        archives = [path]
    if not archives:
        raise InputError(f"'{path}' holds no archives (*.tar)")
    faults = Faults(path)
    with ThreadPoolExecutor(THREADS if isinstance(path, str) else 1) as pool:
        samples = [*pool.map(lambda archive: _samples(archive, columns), archives)]
        faults.extend(each for each, _, _ in samples)
        faults.refuse()
        places = [where for _, found, _ in samples for where, _ in found]
        if not places:
            raise InputError(f"'{path}' holds no samples; a sample is a video and a caption (000001.mp4, 000001.txt)")
        read = [*pool.map(lambda each: _records(each[1], each[2], columns), samples)]
    faults.extend(each for each, _ in read)
    faults.refuse()
    records = [record for _, of_archive in read for record in of_archive]
    names = list(dict.fromkeys(name for record in records for name in record))
    return Table(path, path, names, lambda _: iter(enumerate(records)), lambda number, _: places[number])


def tar_files(folder: Path) -> list[Path]:
    """Return the archives of a folder."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() == ".tar" and not path.name.startswith("."))


Sample = tuple[str, dict[str, Member]]  # its name in messages, and suffix → file


def _samples(archive: Archive, columns: Columns) -> tuple[Faults, list[Sample], dict[int, bytes]]:
    """Return the faults and the samples of an archive, and the content of members that is known, by offset."""
    faults, found = Faults(archive), dict[str, dict[str, Member]]()
    names, known = Files(archive), dict[int, bytes]()
    try:
        for name, offset, size, content in _members(archive):
            folder, _, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            inner, dot, last = ending.rpartition(".")
            ending = inner + dot + last.lower()
            if not stem or not ending:
                continue
            try:
                names.inside(name)
            except ValueError as error:
                faults.add(str(archive), str(error))
            key = f"{folder}/{stem}" if folder else stem
            files = found.setdefault(key, {})
            if ending in files:
                faults.add(f"{archive}, {name}", "comes twice; keep one of them")
            files[ending] = Member(archive, name, offset, size)
            if content is not None:
                known[offset] = content
    except ArchiveError as error:
        faults.add(str(archive), str(error))
    except OSError as error:
        faults.add(str(archive), f"cannot be read ({reason_of(error)})")
    has_parts = any("." in name for name in vars(columns).values() if name)
    samples: list[Sample] = []
    for key, files in found.items():
        named = {key: files} if has_parts or columns.video in files else _split_names(key, files)
        samples += [(f"{archive}, {name}", own) for name, own in named.items()]
    return faults, samples, known


def _members(archive: Archive) -> Iterator[tuple[str, int, int, bytes | None]]:
    """Yield name, offset, size and, where it is known, content of the files in an archive."""
    if isinstance(archive, RemoteFile):
        yield from members_of(archive)
        return
    require_file(archive)
    with archive.open("rb") as file:
        yield from ((*member, None) for member in files_of(file))


def _records(
    samples: Sequence[Sample], known: Mapping[int, bytes], columns: Columns
) -> tuple[Faults, list[dict[str, Any]]]:
    """Return the faults and the records of the samples of an archive."""
    faults = Faults("")
    with contextlib.ExitStack() as stack:
        opened: list[BinaryIO] = []

        def read(member: Member) -> bytes:
            if isinstance(member.container, RemoteFile):
                return known[member.offset] if member.offset in known else member.read()
            if not opened:  # the archive of all samples, once
                opened.append(stack.enter_context(member.container.open("rb")))
            return member.read_from(opened[0])

        return faults, [_record(where, files, columns, read, faults) for where, files in samples]


def _split_names(key: str, files: dict[str, Member]) -> dict[str, dict[str, Member]]:
    """Return name → suffix → file of the samples among files that share a name up to the first dot.

    The dot belongs to the name (``take 1.5x.mp4``) where each name up to the last dot has a video or picture of its
    own, and a caption of its own if there are files without a second dot. Otherwise the files are parts of one sample
    (``1.left.mp4``, ``1.right.mp4``, ``1.txt``), told apart by their whole suffix.
    """
    parts: dict[str, dict[str, Member]] = {}
    for ending, member in files.items():
        inner, _, last = ending.rpartition(".")
        parts.setdefault(inner, {})[last] = member
    plain = parts.pop("", None)
    captions = {*CAPTION_NAMES, "json"}
    for own in parts.values():
        if not _of_kind(own, VIDEO_SUFFIXES + PICTURE_SUFFIXES) or (plain and captions.isdisjoint(own)):
            return {key: files}
    return ({key: plain} if plain else {}) | {f"{key}.{inner}": own for inner, own in parts.items()}


def _record(
    where: str, files: Mapping[str, Member], columns: Columns, read: Callable[[Member], bytes], faults: Faults
) -> dict[str, Any]:
    """Return column → value of a sample."""
    record: dict[str, Any] = dict(files)
    if "json" in files:
        try:
            content = parse_json(read(record.pop("json")), unique=True)
        except JSONError as error:
            faults.add(f"{files['json']}", f"is not a JSON object: {error}")
        else:
            if isinstance(content, dict):
                record |= content
            else:
                faults.add(
                    f"{files['json']}", f"is not a JSON object: {reprlib.repr(content)}; give one with the caption"
                )
    if columns.video is None:
        clips = _of_kind(files, VIDEO_SUFFIXES) or _of_kind(files, PICTURE_SUFFIXES)
        if len(clips) != 1:
            found = f"holds {len(clips) or 'no'} videos ({', '.join(files)})"
            faults.add(where, f"{found}; keep one, or set data.params.video_column to its suffix")
        record["video"] = files[clips[0]] if clips else None
    for name in [columns.caption] if columns.caption else CAPTION_NAMES:
        if name in files:
            try:
                record[name] = read(files[name]).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                faults.add(str(files[name]), f"is not UTF-8 text (byte {error.start}); save it as UTF-8")
    if columns.caption is None:
        record["caption"] = next((record[name] for name in CAPTION_NAMES if isinstance(record.get(name), str)), None)
    return record


def _of_kind(files: Mapping[str, Member], suffixes: Sequence[str]) -> list[str]:
    return [name for name in files if f".{name.rpartition('.')[2].lower()}" in suffixes]
