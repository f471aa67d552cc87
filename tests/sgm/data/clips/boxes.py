"""Boxes of mp4 and elements of Matroska that FFmpeg does not write, put into files that it wrote."""

import struct
from collections.abc import Sequence

_HEAD = {b"stsd": 16, b"avc1": 86}  # bytes of a box before those in it; others have 8


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def with_box(data: bytes, path: Sequence[bytes], new: bytes) -> bytes:
    """Return an mp4 file whose index is at its end, with `new` in the box at `path`, instead of one of its kind."""
    changed, outer, start, end = bytearray(data), [], 0, len(data)
    for kind in path:
        start, size = next((at, size) for at, size, found in _boxes(data, start, end) if found == kind)
        outer.append(start)
        start, end = start + _HEAD.get(kind, 8), start + size
    at, size = next(((at, size) for at, size, found in _boxes(data, start, end) if found == new[4:8]), (end, 0))
    changed[at : at + size] = new
    for place in outer:
        struct.pack_into(">I", changed, place, struct.unpack_from(">I", data, place)[0] + len(new) - size)
    return bytes(changed)


def _boxes(data: bytes, start: int, end: int):
    while start < end:
        size, kind = struct.unpack_from(">I4s", data, start)
        yield start, size, kind
        start += size


def with_edits(data: bytes, edits: Sequence[tuple[float, int | None]], rates: Sequence[float] = ()) -> bytes:
    """Return an mp4 file of 30 frames a second, 100 ticks each, with another edit list.

    Args:
        data: the file, with an edit list.
        edits: seconds and first frame; None shows nothing.
        rates: of the edits; 1 if not given.
    """
    scale = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    entries = (
        struct.pack(">IiI", round(seconds * scale), -1 if frame is None else frame * 100, round(rate * 65536))
        for (seconds, frame), rate in zip(edits, rates or [1] * len(edits), strict=True)
    )
    new = box(b"elst", struct.pack(">II", 0, len(edits)) + b"".join(entries))
    return with_box(data, (b"moov", b"trak", b"edts"), new)


def with_aperture(data: bytes, width: int, height: int, right: int = 0, down: int = 0) -> bytes:
    """Return an mp4 file of H.264 with a clean aperture, whose centre is moved in halves of a pixel."""
    new = box(b"clap", struct.pack(">8i", width, 1, height, 1, right, 2, down, 2))
    return with_box(data, (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"), new)


def with_pixel_crop(data: bytes, top: int, bottom: int, left: int, right: int) -> bytes:
    """Return a Matroska file with cropping of its first video."""
    crops = zip((0x54BB, 0x54AA, 0x54CC, 0x54DD), (top, bottom, left, right), strict=True)
    new = b"".join(struct.pack(">HBB", number, 0x81, value) for number, value in crops)
    changed, start, end = bytearray(data), 0, len(data)
    for number in (b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"):  # Segment, Tracks, track, Video
        at, start, end = next(found for found in _elements(data, start, end) if data[found[0] :].startswith(number))
        length = start - at - len(number)
        size = end - start + len(new) | 1 << 7 * length
        changed[at + len(number) : start] = size.to_bytes(length)
    changed[end:end] = new
    return bytes(changed)


def _elements(data: bytes, start: int, end: int):
    while start < end:
        name = 9 - data[start].bit_length()
        length = 9 - data[start + name].bit_length()
        inner = start + name + length
        stop = inner + (int.from_bytes(data[start + name : inner]) & (1 << 7 * length) - 1)
        yield start, inner, stop
        start = stop
