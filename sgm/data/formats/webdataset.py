"""WebDataset archives: tar files in which the files of a sample share a name up to its first dot.

Archives are not unpacked: decoding processes read members at their offset.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sgm.data.formats.manifest import CAPTION_NAMES, Columns, Table
from sgm.data.rows import PICTURE_SUFFIXES, VIDEO_SUFFIXES, Faults, Files, require_file
from sgm.util import InputError


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive."""

    container: Path  # the archive
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
        with self.container.open("rb") as archive:
            return self.read_from(archive)

    def read_from(self, archive: BinaryIO) -> bytes:
        """Return its bytes from the open archive."""
        archive.seek(self.offset)
        return archive.read(self.size)


def read_archives(path: Path, columns: Columns) -> Table:
    """Read one tar file, or those of a folder, as a table; columns are file suffixes and keys of JSON files.

    A caption is a text file, or the value of a key.

    Raises:
        InputError: there is no archive, or one is damaged, compressed, or has duplicate files.
    """
    archives = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not archives:
        raise InputError(f"'{path}' holds no archives (*.tar)")
    faults = Faults(path)
    samples = {archive: list(_samples(archive, faults)) for archive in archives}
    faults.refuse()
    places = [where for found in samples.values() for where, _ in found]
    if not places:
        raise InputError(f"'{path}' holds no samples; a sample is a video and a caption (000001.mp4, 000001.txt)")
    records: list[dict[str, Any]] = []
    for archive, found in samples.items():
        with archive.open("rb") as file:
            records += [_record(where, files, columns, file, faults) for where, files in found]
    faults.refuse()
    names = list(dict.fromkeys(name for record in records for name in record))
    return Table(path, path, names, iter(enumerate(records)), lambda number, _: places[number])


def _samples(archive: Path, faults: Faults) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield the name of each sample in messages, and suffix → file."""
    found: dict[str, dict[str, Member]] = {}
    names = Files(archive)
    try:
        require_file(archive)
        with tarfile.open(archive, "r:") as file:
            for entry in file:
                folder, _, base = entry.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if not entry.isfile() or not stem or not ending:
                    continue
                try:
                    names.inside(entry.name)
                except ValueError as error:
                    faults.add(str(archive), str(error))
                key = f"{folder}/{stem}" if folder else stem
                files = found.setdefault(key, {})
                if ending in files:
                    faults.add(f"{archive}, {entry.name}", "comes twice; keep one of them")
                files[ending] = Member(archive, entry.name, entry.offset_data, entry.size)
    except (tarfile.TarError, OSError) as error:
        cure = "copy it again; it must not be compressed, as its files are read by offset"
        faults.add(str(archive), f"is not a tar file, or a damaged one ({error}); {cure}")
    yield from ((f"{archive}, {key}", files) for key, files in found.items())


def _record(
    where: str, files: Mapping[str, Member], columns: Columns, archive: BinaryIO, faults: Faults
) -> dict[str, Any]:
    """Return column → value of a sample."""
    record: dict[str, Any] = dict(files)
    if "json" in files:
        try:
            content = json.loads(record.pop("json").read_from(archive))
            record |= content
        except (ValueError, TypeError) as error:
            faults.add(f"{files['json']}", f"is not a JSON object: {error}")
    if columns.video is None:
        clips = _of_kind(files, VIDEO_SUFFIXES) or _of_kind(files, PICTURE_SUFFIXES)
        if len(clips) != 1:
            found = f"holds {len(clips) or 'no'} videos ({', '.join(files)})"
            faults.add(where, f"{found}; keep one, or set data.params.video_column to its suffix")
        record["video"] = files[clips[0]] if clips else None
    for name in [columns.caption] if columns.caption else CAPTION_NAMES:
        if name in files:
            try:
                record[name] = files[name].read_from(archive).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                faults.add(str(files[name]), f"is not UTF-8 text (byte {error.start})")
    if columns.caption is None:
        record["caption"] = next((record[name] for name in CAPTION_NAMES if isinstance(record.get(name), str)), None)
    return record


def _of_kind(files: Mapping[str, Member], suffixes: Sequence[str]) -> list[str]:
    return [name for name in files if f".{name.rpartition('.')[2].lower()}" in suffixes]
