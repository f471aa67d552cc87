"""The files in a tar archive: all of them, or an error.

Readers of tar files, Python's too, take the first block that is no header for the end: the end marker (two blocks of
zeros), but a damaged header as well, or the end of a file that was cut between two members. They leave out what lies
behind the marker, where another archive was appended with ``cat``. Here a missing marker and a damaged header are
refused, and joined archives are read as ``tar --ignore-zeros`` does.
"""

import errno
import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from sgm.io import reason_of
from sgm.util import InputError

BLOCK = tarfile.BLOCKSIZE
_PIECE = 128 * BLOCK  # bytes that are read at a time behind the end marker
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
COMPRESSED_SUFFIXES = (".tgz", *(f".tar.{name}" for name in ("gz", "bz2", "xz", "zst", "lz4")))


class ArchiveError(Exception):
    """An archive cannot be read as a whole; the message has the fault, its place and the cure, not the archive."""


def files_of(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset in bytes and size in bytes of the files in an uncompressed archive, in order.

    A hard link is a file, too: that with the content of the member that it links to.

    Raises:
        ArchiveError: it is damaged, cut or compressed, or holds a member that is neither file nor folder.
        OSError: it cannot be read.
    """
    start: int | None = 0
    files: dict[str, tuple[int, int]] = {}
    while start is not None:
        place = start
        file.seek(place)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for entry in archive:
                    place = archive.offset
                    if not entry.isdir():
                        files[entry.name] = _content(entry, files)
                        yield entry.name, *files[entry.name]
                end = archive.offset
        except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
            # Odd numbers in headers are ValueErrors, or places that cannot be sought.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            raise ArchiveError(_not_one(file, place, reason_of(error))) from None
        if end == start > 0:
            raise ArchiveError(
                f"holds something that is no archive behind its end marker, at byte {start:,}; copy it again, or cut "
                f"that off with truncate -s {start}"
            )
        _require_marker(file, end)
        start = _next_start(file, end)


def refuse_compressed(folder: object, names: Iterable[str]) -> None:
    """Raise an InputError if one of the names in a folder of archives is that of a compressed one."""
    if found := sorted(name for name in names if name.lower().endswith(COMPRESSED_SUFFIXES)):
        more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
        raise InputError(
            f"'{folder}' holds compressed archives ('{found[0]}'{more}), whose files cannot be read by offset; "
            "decompress them, or move them out of the folder"
        )


def _content(entry: tarfile.TarInfo, files: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Return offset and size of the content of a member that is no folder."""
    pack = "pack the files themselves (tar --dereference)"
    if entry.islnk():
        if entry.linkname not in files:
            raise ArchiveError(f"holds '{entry.name}', a link to '{entry.linkname}', which does not precede it; {pack}")
        return files[entry.linkname]
    if not entry.isfile():
        kind = f"a link to '{entry.linkname}'" if entry.issym() else "neither file nor folder"
        raise ArchiveError(f"holds '{entry.name}', {kind}; {pack}")
    if entry.issparse():
        raise ArchiveError(f"holds '{entry.name}' as a sparse file; pack it without tar's option --sparse")
    if entry.size < 0:
        raise ArchiveError(f"is damaged: '{entry.name}' has {entry.size} bytes; copy it again")
    return entry.offset_data, entry.size


def _not_one(file: BinaryIO, place: int, reason: str) -> str:
    """Return what is said of a file that tarfile refuses at a place in bytes."""
    file.seek(0)
    first = file.read(8)
    for magic, name in _COMPRESSED.items():
        if first.startswith(magic):
            return f"is compressed ({name}), and its files are read by offset; decompress it"
    if place == 0:
        return f"is not a tar file, or a damaged one ({reason}); copy it again"
    return f"is cut or damaged near byte {place:,} ({reason}); copy it again"


def _require_marker(file: BinaryIO, place: int) -> None:
    """Check that the block at a place in bytes, behind the last member, begins an end marker."""
    file.seek(place)
    block = file.read(BLOCK)
    if not block:
        raise ArchiveError(
            f"ends at byte {place:,} without the two blocks of zeros that end an archive, so it may be cut, and "
            "samples be missing; copy it again, or, if it is whole and its writer left them out, add them with "
            f"truncate -s {place + 2 * BLOCK}"
        )
    if len(block) < BLOCK:
        raise ArchiveError(f"is cut: it ends inside of the header at byte {place:,}; copy it again")
    if any(block):
        raise ArchiveError(f"is damaged: there is no header at byte {place:,}; copy it again")


def _next_start(file: BinaryIO, place: int) -> int | None:
    """Return the first block behind a place, in bytes, that holds something; None if there is none."""
    file.seek(place)
    while piece := file.read(_PIECE):
        if rest := piece.lstrip(b"\0"):
            return (place + len(piece) - len(rest)) // BLOCK * BLOCK
        place += len(piece)
    return None
