"""Checksums of tensors in weights files: what others wrote is read, and what takes less time is written.

``torch.save`` writes a zip archive, whose directory has the CRC-32 of every entry; ``torch.load`` does not compare it.
The safetensors format has none. Reading with CRC-32 takes about twice as long as without, so files written here have
XXH3 hashes, which take a tenth of that:

- `save_torch` appends an entry "xxh3" to the archive: JSON with the hash of every tensor by the name of its entry;
- `write_safetensors` has them in the metadata of the header, under "xxh3": sixteen hexadecimal digits for the header
  itself (computed with zeros in their place), then sixteen for each tensor in the order of the data.

Both say under "finite" whether all values were finite: then those of a tensor with the right hash are, and reading need
not look for NaN.

A file that another tool rewrote is not compared with outdated hashes: archives then lack the entry, and our headers
have spaces after separators, which those of the safetensors library do not. Headers of earlier versions have CRC-32,
under "crc32".
"""

import io
import json
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from sgm.io import atomic_file, parse_json
from sgm.util import InputError
from sgm.weights.lazy import AnyTensor, LazyTensor, compute, meta

KEY, OLD_KEY, FINITE = "xxh3", "crc32", "finite"  # in metadata of safetensors files
PIECE = 1 << 22  # bytes that stay in a processor's cache while they are copied and checked
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HEXADECIMAL = re.compile("[0-9a-f]+")
_OVERFLOW_CURE = "write it in bf16 or fp32 (--dtype); if adapters are merged or scaled, correct their alpha or strength"
_OURS = b'{"__metadata__": {'
_DIGITS = {KEY: 16, OLD_KEY: 8}
_xxh3 = xxhash.xxh3_64_intdigest


class _CRC32:
    """CRC-32 with the methods of hashes."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any) -> None:
        self._value = zlib.crc32(data, self._value)

    def intdigest(self) -> int:
        return self._value


_HASHES: dict[str, Callable[[], Any]] = {KEY: xxhash.xxh3_64, OLD_KEY: _CRC32}


@dataclass(frozen=True)
class Checksums:
    """What the bytes of the tensors in a file must hash to.

    Attributes:
        values: the checksums that a tensor may have, by its name in a safetensors file, by its size in an archive.
        key: `KEY` or `OLD_KEY`: how they are computed.
        finite: whether all values were finite.
    """

    values: Mapping[Any, Collection[int]]
    key: str = KEY
    finite: bool = False

    def fit(self, place: str | int, tensor: torch.Tensor) -> bool:
        """Return whether the bytes of a dense tensor, in the order of its elements, have the checksum of `place`."""
        return self.fit_pieces(place, pieces(tensor))

    def fit_pieces(self, place: str | int, parts: Iterable[torch.Tensor]) -> bool:
        """Do the same for a tensor that comes in pieces of one axis."""
        hashed = _HASHES[self.key]()
        for part in parts:
            hashed.update(_bytes(part))
        return hashed.intdigest() in self.values.get(place, ())


def pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a dense tensor in pieces of one axis."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    yield from flat.split(max(1, PIECE // max(1, flat.element_size()))) if flat.numel() else ()


class Watched:
    """The pieces of a floating-point tensor; their sums tell whether its values are finite."""

    def __init__(self, parts: Iterable[torch.Tensor]) -> None:
        self._parts = parts
        self._sums: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        for part in self._parts:
            # float8 has no sums
            self._sums.append((part.to(torch.bfloat16) if part.element_size() == 1 else part).sum())
            yield part

    def finite(self) -> bool:
        """Return whether all values so far are finite; False also if they are so large that a sum overflows."""
        return not self._sums or bool(torch.isfinite(torch.stack(self._sums)).all())


def all_finite(parts: Iterable[torch.Tensor]) -> bool:
    """Return what `Watched.finite` does, of all pieces."""
    watched = Watched(parts)
    for _ in watched:
        pass
    return watched.finite()


def extremes(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the largest value of a floating-point tensor; both are NaN if one is."""
    least, largest = (tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor).aminmax()
    return least, largest


def overflow_problem(made: torch.Tensor, wide: Callable[[], torch.Tensor], cure: str = _OVERFLOW_CURE) -> str:
    """Return why what was computed from finite values is not finite in its dtype; empty if it is.

    Args:
        made: the result, on any device.
        wide: returns it in a dtype of a wider range, for the message.
        cure: the end of the message.
    """
    if not made.is_floating_point() or made.numel() == 0 or all(map(torch.isfinite, extremes(made))):
        return ""
    largest = max(abs(value.item()) for value in extremes(wide()))
    dtype = str(made.dtype).removeprefix("torch.")
    found = f"has values up to {largest:g}, and" if math.isfinite(largest) else "has values out of range:"
    return f"{found} {dtype} holds numbers up to {torch.finfo(made.dtype).max:g}; {cure}"


def require_finite(path: Path, name: str, tensor: AnyTensor, made: torch.Tensor) -> None:
    """Raise InputError unless a tensor, about to be written to `path`, is finite once it is computed: `made`."""
    wide = partial(compute, tensor.cast(torch.float64) if isinstance(tensor, LazyTensor) else made)
    if problem := overflow_problem(made, wide):
        raise InputError(f"{path.name} is not written: {name} {problem}")


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# --- Archives of torch.save.


def save_torch(content: Any, path: Path) -> None:
    """Call torch.save, and add checksums; the bytes do not depend on the file's name."""
    with path.open("w+b") as file:  # given its name, torch.save would name the archive's folder after it
        torch.save(content, file)
        file.flush()  # the hashes are those of the file
        with zipfile.ZipFile(file, "a") as archive:
            hashes = {info.filename: f"{_xxh3(data):016x}" for info, data in _tensor_entries(path, archive)}
            if all(all_finite(pieces(tensor)) for tensor in _floating(content)):
                hashes[FINITE] = "1"
            folder = archive.infolist()[0].filename.partition("/")[0]
            archive.writestr(zipfile.ZipInfo(f"{folder}/{KEY}"), json.dumps(hashes))


def _floating(content: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors in mappings and sequences."""
    if isinstance(content, torch.Tensor):
        if content.is_floating_point():
            yield content
    elif isinstance(content, Mapping | list | tuple):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _floating(value)


def zip_checksums(path: Path) -> Checksums | None:
    """Return the checksums of an archive; None if none were written.

    The entries that are not tensors, which hold all names and plain values, are compared with their CRC-32.

    Raises:
        zipfile.BadZipFile: the archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        if not any(info.CRC for info in archive.infolist()):  # torch.serialization.set_crc32_options(False)
            return None
        others = {info.filename: archive.read(info) for info in archive.infolist() if not _is_tensor(info)}
        if any(name.endswith("/byteorder") and text != sys.byteorder.encode() for name, text in others.items()):
            return None  # torch swaps the bytes that it reads
        own = _own_hashes(archive)
        found: dict[int, set[int]] = {}
        for info in filter(_is_tensor, archive.infolist()):
            found.setdefault(info.file_size, set()).add(info.CRC if own is None else own.get(info.filename, -1))
        return Checksums(found, OLD_KEY if own is None else KEY, FINITE in (own or ()))


def damaged_entry(path: Path) -> str:
    """Return the first entry of an archive whose bytes differ from their checksum; empty if none does.

    Raises:
        zipfile.BadZipFile: the archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        if not any(info.CRC for info in archive.infolist()):
            return ""
        if (own := _own_hashes(archive)) is None:
            return archive.testzip() or ""
        for info in archive.infolist():
            if not _is_tensor(info):
                archive.read(info)
        for info, data in _tensor_entries(path, archive):
            if _xxh3(data) != own.get(info.filename):
                return info.filename
        return ""


class CheckedArchive(io.FileIO):
    """A file of torch.save, for torch.load: what it reads of tensors is hashed in a second thread, right behind.

    Attributes:
        finite: whether all values were finite.

    Raises:
        zipfile.BadZipFile: the archive is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._beside = ThreadPoolExecutor(1)  # its thread starts with the first tensor
        super().__init__(path)
        self._path, self._damaged = path, ""
        with zipfile.ZipFile(path) as archive:
            own = _own_hashes(archive)
            has_any = any(info.CRC for info in archive.infolist())
            for info in archive.infolist() if has_any else ():
                if not _is_tensor(info):
                    archive.read(info)
            starts = _tensor_starts(path, archive) if has_any else ()
            self._unread = {
                start: (info, info.CRC if own is None else own.get(info.filename)) for info, start in starts
            }
        self._hash = _HASHES[OLD_KEY if own is None else KEY]
        self.finite = FINITE in (own or ())

    def readinto(self, buffer: Any, /) -> int:
        """Read into `buffer`, and hash it if it gets a whole tensor."""
        view, start = memoryview(buffer).cast("B"), self.tell()
        info, wanted = self._unread.get(start, (None, None))
        if info is None or info.file_size != len(view):
            return super().readinto(view)
        hashed, done, last = self._hash(), 0, None
        while num := super().readinto(view[done : done + PIECE]):
            last = self._beside.submit(hashed.update, view[done : done + num])
            done += num
        if last is not None:
            last.result()
        if hashed.intdigest() != wanted:
            self._damaged = self._damaged or info.filename
        del self._unread[start]
        return done

    def close(self) -> None:
        """Close the file and end the thread."""
        self._beside.shutdown()
        super().close()

    def damaged_entry(self) -> str:
        """Return what the function of this name does, after torch.load."""
        left = any(info.file_size for info, _ in self._unread.values())
        return self._damaged or (damaged_entry(self._path) if left else "")


def _is_tensor(info: zipfile.ZipInfo) -> bool:
    return "/data/" in info.filename


def _own_hashes(archive: zipfile.ZipFile) -> dict[str, int] | None:
    """Return the hash of every tensor by the name of its entry; None if `save_torch` did not write the archive."""
    last = archive.infolist()[-1]
    if not last.filename.endswith(f"/{KEY}"):
        return None
    hashes = parse_json(archive.read(last))
    if not isinstance(hashes, dict):
        raise zipfile.BadZipFile(f"the entry {last.filename} does not hold checksums by name")
    return {name: int(str(digits), 16) for name, digits in hashes.items()}


def _tensor_starts(path: Path, archive: zipfile.ZipFile) -> Iterator[tuple[zipfile.ZipInfo, int]]:
    """Yield the entries of tensors with the offset of their bytes."""
    whole = np.memmap(path, np.uint8, "r")
    for info in filter(_is_tensor, archive.infolist()):
        lengths = whole[info.header_offset + 26 : info.header_offset + 30].view("<u2")  # of the name and extra field
        yield info, info.header_offset + 30 + int(lengths.sum())


def _tensor_entries(path: Path, archive: zipfile.ZipFile) -> Iterator[tuple[zipfile.ZipInfo, Any]]:
    """Yield the entries of tensors with their bytes, memory-mapped."""
    whole = np.memmap(path, np.uint8, "r")
    for info, start in _tensor_starts(path, archive):
        yield info, whole[start : start + info.file_size]


# --- Safetensors files.


def read_header(path: Path) -> bytes:
    """Return the JSON in the header of a safetensors file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size))


def safetensors_checksums(path: Path) -> Checksums | None:
    """Return the checksums of a safetensors file; None if `write_safetensors` did not write it.

    Raises:
        ValueError: the header differs from its checksum.
    """
    return header_checksums(read_header(path))


def header_checksums(raw: bytes) -> Checksums | None:
    """Return what `safetensors_checksums` does, from the JSON in the header of a file."""
    if not raw.startswith(_OURS):
        return None
    header = parse_json(raw)
    metadata = header.pop("__metadata__")
    if not {KEY, OLD_KEY} & metadata.keys():  # others write their header in this order, too
        return None
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    key = OLD_KEY if OLD_KEY in metadata else KEY
    digits, length, hashed = str(metadata[key]), _DIGITS[key], _HASHES[key]()
    hashed.update(_cleared(raw, digits))
    is_written = len(digits) == length * (1 + len(names)) and _HEXADECIMAL.fullmatch(digits)
    if not is_written or int(digits[:length], 16) != hashed.intdigest():
        raise ValueError("its header changed after it was written (checksum)")
    starts = range(length, len(digits), length)
    found = {name: {int(digits[start : start + length], 16)} for name, start in zip(names, starts, strict=True)}
    return Checksums(found, key, metadata.get(FINITE) == "1")


def _cleared(raw: bytes, digits: str) -> bytes:
    """Return a header with zeros in the place of its checksums."""
    return raw.replace(digits.encode(), b"0" * len(digits), 1)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, AnyTensor],
    *,
    metadata: Mapping[str, str] | None = None,
    any_values: bool = False,
) -> None:
    """Write one ``.safetensors`` file with checksums, with one lazy tensor in memory at a time.

    Args:
        path: the file.
        tensors: by name, from any device.
        metadata: for the header; ``format: pt``, which readers expect, is added.
        any_values: write NaN and infinity too, as of a training that failed.

    Raises:
        InputError: values are not finite; no partial file is left.
        RunError: the disk is full or the folder cannot be written to; no partial file is left.
    """
    metas = {name: meta(tensor) for name, tensor in tensors.items()}
    names = sorted(metas, key=lambda name: (-metas[name].element_size(), name))  # keeps every tensor aligned
    zeros = "0" * _DIGITS[KEY] * (1 + len(names))
    marks = {KEY: zeros, FINITE: "0"}
    header: dict[str, Any] = {"__metadata__": {**marks, "format": "pt", **(metadata or {})} | marks}
    end = 0
    for name in names:
        each, start, end = metas[name], end, end + metas[name].nbytes
        header[name] = {"dtype": DTYPES[each.dtype], "shape": list(each.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with atomic_file(path, need_bytes=8 + len(head) + end) as temporary, temporary.open("wb") as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        digits, finite = "", True
        for name in names:
            tensor = compute(tensors[name])
            if tensor.is_floating_point() and not all_finite(pieces(tensor)):
                finite = False
                if not any_values:
                    require_finite(Path(path), name, tensors[name], tensor)
            data = _bytes(tensor)
            digits += f"{_xxh3(data):016x}"
            file.write(data)
        if finite:
            head = head.replace(f'"{FINITE}": "0"'.encode(), f'"{FINITE}": "1"'.encode(), 1)
        digits = f"{_xxh3(head):016x}{digits}"
        file.seek(8)
        file.write(head.replace(zeros.encode(), digits.encode(), 1))
