"""CRC-32 checksums in weights files: read from zip archives, read from and written to safetensors headers.

``torch.save`` writes a zip archive, whose directory has the CRC-32 of every entry; ``torch.load`` does not compare it.
The safetensors format has none. `write_safetensors` adds them to the metadata of the header, under "crc32": eight
hexadecimal digits for the header itself (computed with zeros in their place), then eight for each tensor in the order
of the data. Its header has spaces after separators, which those of the safetensors library do not: a file that another
tool rewrote, and whose metadata it copied, is not compared with outdated checksums.
"""

import json
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sgm.io import atomic_file
from sgm.weights.lazy import AnyTensor, compute, meta

KEY = "crc32"
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
_OURS = b'{"__metadata__": {'
_DIGITS = 8


def crc32(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a dense tensor's bytes, in the order of its elements."""
    return zlib.crc32(_bytes(tensor))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# --- Archives of torch.save.


def zip_checksums(path: Path) -> dict[int, set[int]] | None:
    """Return the CRC-32s of an archive by size of the entry; None if they were not written.

    The entries that are not tensors, which hold all names and plain values, are compared with theirs.

    Raises:
        zipfile.BadZipFile: the archive is damaged.
    """
    found: dict[int, set[int]] = {}
    with zipfile.ZipFile(path) as archive:
        if not any(info.CRC for info in archive.infolist()):  # torch.serialization.set_crc32_options(False)
            return None
        for info in archive.infolist():
            if "/data/" in info.filename:
                found.setdefault(info.file_size, set()).add(info.CRC)
            elif archive.read(info) != sys.byteorder.encode() and info.filename.endswith("/byteorder"):
                return None  # torch swaps the bytes that it reads
    return found


def damaged_entry(path: Path) -> str:
    """Return the first entry of an archive whose bytes differ from its CRC-32; empty if none does.

    Raises:
        zipfile.BadZipFile: the archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        return (any(info.CRC for info in archive.infolist()) and archive.testzip()) or ""


# --- Safetensors files.


def read_header(path: Path) -> bytes:
    """Return the JSON in the header of a safetensors file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size))


def safetensors_checksums(path: Path) -> dict[str, int] | None:
    """Return the CRC-32 of each tensor in a safetensors file; None if `write_safetensors` did not write it.

    Raises:
        ValueError: the header differs from its CRC-32.
    """
    return header_checksums(read_header(path))


def header_checksums(raw: bytes) -> dict[str, int] | None:
    """Return what `safetensors_checksums` does, from the JSON in the header of a file."""
    if not raw.startswith(_OURS):
        return None
    header = json.loads(raw)
    metadata = header.pop("__metadata__")
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    digits = metadata.get(KEY, "")
    if len(digits) != _DIGITS * (1 + len(names)) or int(digits[:_DIGITS], 16) != zlib.crc32(_cleared(raw, digits)):
        raise ValueError("its header changed after it was written (CRC-32)")
    starts = range(_DIGITS, len(digits), _DIGITS)
    return {name: int(digits[start : start + _DIGITS], 16) for name, start in zip(names, starts, strict=True)}


def _cleared(raw: bytes, digits: str) -> bytes:
    """Return a header with zeros in the place of its checksums."""
    return raw.replace(digits.encode(), b"0" * len(digits), 1)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, AnyTensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one ``.safetensors`` file with checksums, with one lazy tensor in memory at a time.

    Args:
        path: the file.
        tensors: by name, from any device.
        metadata: for the header; ``format: pt``, which readers expect, is added.

    Raises:
        RunError: the disk is full or the folder cannot be written to; no partial file is left.
    """
    metas = {name: meta(tensor) for name, tensor in tensors.items()}
    names = sorted(metas, key=lambda name: (-metas[name].element_size(), name))  # keeps every tensor aligned
    zeros = "0" * _DIGITS * (1 + len(names))
    header: dict[str, Any] = {"__metadata__": {KEY: zeros, "format": "pt", **(metadata or {})} | {KEY: zeros}}
    end = 0
    for name in names:
        each, start, end = metas[name], end, end + metas[name].nbytes
        header[name] = {"dtype": DTYPES[each.dtype], "shape": list(each.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with atomic_file(path, need_bytes=8 + len(head) + end) as temporary, temporary.open("wb") as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        digits = f"{zlib.crc32(head):08x}"
        for name in names:
            data = _bytes(compute(tensors[name]))
            digits += f"{zlib.crc32(data):08x}"
            file.write(data)
        file.seek(8)
        file.write(head.replace(zeros.encode(), digits.encode(), 1))
