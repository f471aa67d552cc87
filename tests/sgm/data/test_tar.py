"""Every file of a tar archive is found, or the archive is refused: where others end quietly, too."""

import gzip
import io
import tarfile
from pathlib import Path

import fsspec
import pytest

from sgm.data.formats.manifest import Columns
from sgm.data.formats.registry import list_rows
from sgm.data.formats.webdataset import read_archives
from sgm.data.remote.store import Store
from sgm.data.tar import ArchiveError, files_of
from sgm.util import InputError

BLOCK = 512


def packed(*names: str, **kinds: bytes) -> bytes:
    """Return an archive of files with their names as content; of `kinds`, types of further members that link to `a`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
        for name, kind in kinds.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a"
            archive.addfile(entry)
    return file.getvalue()


def read(content: bytes) -> dict[str, str]:
    return {name: content[start : start + size].decode() for name, start, size in files_of(io.BytesIO(content))}


TWO = packed("a", "bb")
END = 4 * BLOCK  # of the last member, where the end marker begins


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (TWO, ["a", "bb"]),
        (TWO[: END + BLOCK], ["a", "bb"]),  # one block of the marker shows that no member follows
        (TWO[:END] + bytes(2 * BLOCK) + packed("c"), ["a", "bb", "c"]),
        (TWO + packed("c") + bytes(1 << 18) + packed("d", "e"), ["a", "bb", "c", "d", "e"]),
        (packed(folder=tarfile.DIRTYPE) + TWO, ["a", "bb"]),
        (packed(), []),
    ],
)
def test_files_of_whole_and_joined_archives(content, names):
    assert read(content) == {name: name for name in names}


def test_a_hard_link_has_the_content_of_its_file():
    assert read(packed("a", link=tarfile.LNKTYPE)) == {"a": "a", "link": "a"}


def changed(at: int) -> bytes:
    return TWO[:at] + bytes([TWO[at] ^ 1]) + TWO[at + 1 :]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TWO[:END], "ends at byte 2,048 without the two blocks of zeros .* truncate -s 3072"),
        (TWO[: 2 * BLOCK], "ends at byte 1,024 without"),  # cut between the members
        (TWO[: 2 * BLOCK + 100], "is cut: it ends inside of the header at byte 1,024"),
        (TWO[: 3 * BLOCK + 1], "is cut or damaged near byte 2,048 .unexpected end of data"),
        (changed(2 * BLOCK), "is damaged: there is no header at byte 1,024"),
        (changed(0), "is not a tar file, or a damaged one .*checksum"),
        (b"", "is not a tar file, or a damaged one .empty file"),
        (TWO + b"x", "holds something that is no archive behind its end marker, at byte 10,240; .* truncate -s 10240"),
        (TWO + TWO[:END], "ends at byte 12,288 without"),
        (gzip.compress(TWO), "is compressed .gzip., .* decompress it"),
        (packed("a", soft=tarfile.SYMTYPE), "holds 'soft', a link to 'a'; pack the files .*--dereference"),
        (packed("b", link=tarfile.LNKTYPE), "holds 'link', a link to 'a', which does not precede it"),
        (packed("a", pipe=tarfile.FIFOTYPE), "holds 'pipe', neither file nor folder"),
    ],
)
def test_what_may_lack_files_is_refused(content, said):
    with pytest.raises(ArchiveError, match=said):
        read(content)


def test_a_sparse_file_is_refused():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        entry = tarfile.TarInfo("clip.mp4")
        entry.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}
        archive.addfile(entry)
    with pytest.raises(ArchiveError, match=r"holds 'clip.mp4' as a sparse file; .*--sparse"):
        read(file.getvalue())


@pytest.mark.parametrize("number", ["x", "-9", "9" * 5000, "1"])
def test_wrong_sizes_are_refused(number):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        entry = tarfile.TarInfo("clip.mp4")
        entry.size, entry.pax_headers = 2 * BLOCK, {"size": number}
        archive.addfile(entry, io.BytesIO(b"x" * 2 * BLOCK))
    with pytest.raises(ArchiveError, match="copy it again"):
        read(file.getvalue())


@pytest.fixture
def places(tmp_path):
    """A local folder, and one behind a URL, with a cut archive; each with what reads it."""
    whole, cut = packed("1.mp4", "1.txt"), packed("2.mp4", "2.txt")[:END]
    system = fsspec.filesystem("memory")
    for name, content in {"0.tar": whole, "1.TAR": cut}.items():
        (tmp_path / name).write_bytes(content)
        system.pipe(f"/tars/{name}", content)
    yield {str(tmp_path): tmp_path, "memory://tars": "memory://tars"}
    system.rm("/tars", recursive=True)


def table(place: Path | str, tmp_path: Path) -> object:
    return read_archives(place, Columns(), Store(tmp_path / "store", retries=0))


def test_a_cut_archive_is_named_here_and_afar(places, tmp_path):
    for name, place in places.items():
        with pytest.raises(InputError, match=f"{name}/1.TAR: ends at byte 2,048 without"):
            table(place, tmp_path)


def test_compressed_archives_beside_others_are_refused_here_and_afar(places, tmp_path):
    fsspec.filesystem("memory").pipe("/tars/2.tar.gz", b"")
    (tmp_path / "2.tgz").touch()
    for place in places.values():
        with pytest.raises(InputError, match=r"holds compressed archives \('.*2.t.*gz'\), .*; decompress them"):
            table(place, tmp_path)


def test_a_download_may_lie_beside_the_clips_that_came_with_it(tmp_path):
    for name in ("a.mp4", "a.txt", "clips.tar.gz"):
        (tmp_path / name).write_text("words")
    assert [row.caption for row in list_rows(tmp_path)] == ["words"]
