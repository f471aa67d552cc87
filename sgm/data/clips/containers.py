"""What FFmpeg passes over in the headers of clips: cropping, edit lists, and a second file behind the first.

Boxes and elements are stepped over by their sizes, and only a few bytes of each are read. Reading ends without an error
where a size is impossible: whether a file is damaged is for FFmpeg to say.
"""

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import numpy as np

_MOST = 2**12  # boxes at one level, and edits of a track, that are read
_TAGS = 2**20  # packets of FLV that are stepped over: those of three hours
_MOVIE = "mov,mp4,m4a,3gp,3g2,mj2"  # this and the other names are those of FFmpeg
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_SEGMENT, _CLUSTER, _TRACKS, _TRACK, _TRACK_TYPE, _VIDEO = 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0x83, 0xE0
_CROPS = (0x54BB, 0x54AA, 0x54CC, 0x54DD)  # elements of Matroska, in the order of `Crop`
_ENTRY = 78  # bytes of a video's sample entry before the boxes in it
_NOTHING = -1  # the start of an edit that shows nothing
_NORMAL = 1 << 16  # the rate of an edit, as a number with 16 bits behind the point
_JOINED = "is several files joined to one, of which only the first is played; give each as a file of its own"
_EDITED = "which FFmpeg does not follow; export it again from the program that wrote it"

_Span = tuple[int, int]  # of bytes in a file, without the end


class Crop(NamedTuple):
    """Pixels at the edges of a stored frame that are not shown."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Return (H, W) of what is shown of a frame."""
        return height - self.top - self.bottom, width - self.left - self.right

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Return what is shown of a picture (H, W, ...)."""
        height, width = self.shape(*picture.shape[:2])
        return picture[self.top :, self.left :][:height, :width]


class Header(NamedTuple):
    """What the header of a clip says.

    Attributes:
        crop: of the video.
        is_edited: its parts are played in another order than stored, so decoding times may go back.
        fault: why it cannot be used.
    """

    crop: Crop = Crop()
    is_edited: bool = False
    fault: str | None = None


def read_header(source: str | io.BytesIO, form: str, *, track: int, place: int) -> Header:
    """Return what the header of a clip says about one of its videos.

    Args:
        source: path, or the bytes of the file.
        form: FFmpeg's name of its container format.
        track: FFmpeg's number of the stream, which is that of the track in mp4 and mov.
        place: of the video among the videos of the clip.

    Raises:
        OSError: the file cannot be read.
    """
    with open(source, "rb") if isinstance(source, str) else io.BytesIO(source.getvalue()) as file:
        span = 0, file.seek(0, io.SEEK_END)
        if form == _MOVIE:
            return _movie(file, span, track)
        if form == "matroska,webm":
            return Header(_matroska_crop(file, span, place))
        is_joined = (form == "asf" and _asf_joined(file, span)) or (form == "flv" and _flv_joined(file, span))
        return Header(fault=_JOINED if is_joined else None)


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _boxes(file: BinaryIO, span: _Span) -> Iterator[tuple[bytes, _Span]]:
    """Yield the type and the content of each box of mp4."""
    start, end = span
    for _ in range(_MOST):
        head = _read(file, start, min(16, end - start)) if start < end else b""
        if len(head) < 8:
            return
        size, kind = struct.unpack_from(">I4s", head)
        inner = 8
        if size == 1 and len(head) == 16:
            (size,), inner = struct.unpack_from(">Q", head, 8), 16
        size = size or end - start  # 0: up to the end
        if size < inner:
            return
        yield kind, (start + inner, min(start + size, end))
        start += size


def _inner(file: BinaryIO, span: _Span, *kinds: bytes) -> _Span | None:
    """Return the content of the first box of a type in the first box of another one, and so on."""
    for kind in kinds:
        found = next((inner for found, inner in _boxes(file, span) if found == kind), None)
        if found is None:
            return None
        span = found
    return span


def _movie(file: BinaryIO, span: _Span, track: int) -> Header:
    movie = None
    for kind, inner in _boxes(file, span):
        if kind == b"moof":  # files of fragments are read to their end
            break
        if kind == b"moov":
            if movie is not None:
                return Header(fault=_JOINED)
            movie = inner
    for kind, inner in _boxes(file, movie) if movie is not None else ():
        if kind == b"trak" and _track_number(file, inner) == track:
            is_edited, fault = _edits(file, inner)
            return Header(_clean_aperture(file, inner), is_edited, fault)
    return Header()


def _track_number(file: BinaryIO, track: _Span) -> int | None:
    header = _inner(file, track, b"tkhd")
    content = _read(file, header[0], 24) if header is not None else b""
    if len(content) < 24:
        return None
    return struct.unpack_from(">I", content, 20 if content[0] else 12)[0]


def _edits(file: BinaryIO, track: _Span) -> tuple[bool, str | None]:
    """Return whether a track plays several parts, and what of its edit list FFmpeg does not follow."""
    span = _inner(file, track, b"edts", b"elst")
    content = _read(file, span[0], min(span[1] - span[0], 8 + 20 * _MOST)) if span is not None else b""
    if len(content) < 8:
        return False, None
    entry = ">QqI" if content[0] else ">IiI"  # duration, start, rate
    num = min(struct.unpack_from(">I", content, 4)[0], (len(content) - 8) // struct.calcsize(entry))
    edits = [struct.unpack_from(entry, content, 8 + place * struct.calcsize(entry)) for place in range(num)]
    first = next((place for place, (_, start, _) in enumerate(edits) if start != _NOTHING), num)
    edits = edits[first:]  # those before are a delay
    if any(length and start == _NOTHING for length, start, _ in edits):
        return True, f"has an edit list that shows nothing after its first part, {_EDITED}"
    rates = [rate / _NORMAL for _, start, rate in edits if start != _NOTHING]
    odd = [rate for rate in rates if rate != 1] if rates != [0] else []  # a lone 0 is a slip: the clip would be a still
    if odd:
        return True, f"has an edit list that plays a part at {odd[0]:.4g} times its speed, {_EDITED}"
    return len(rates) > 1, None


def _clean_aperture(file: BinaryIO, track: _Span) -> Crop:
    """Return what the clean aperture of a track hides, rounded as FFmpeg does (ISO/IEC 14496-12, 12.1.4)."""
    descriptions = _inner(file, track, b"mdia", b"minf", b"stbl", b"stsd")
    entry = (
        next((inner for _, inner in _boxes(file, (descriptions[0] + 8, descriptions[1]))), None)
        if descriptions is not None
        else None
    )
    aperture = _inner(file, (entry[0] + _ENTRY, entry[1]), b"clap") if entry is not None else None
    if entry is None or aperture is None:
        return Crop()
    stored, numbers = _read(file, entry[0] + 24, 4), _read(file, aperture[0], 32)
    if len(stored) < 4 or len(numbers) < 32:
        return Crop()
    values = struct.unpack(">8i", numbers)
    if min(values[1::2]) <= 0:
        return Crop()
    shown_w, shown_h, off_x, off_y = (Fraction(*pair) for pair in zip(values[::2], values[1::2], strict=True))
    width, height = struct.unpack(">HH", stored)
    top, bottom = _cut(height, shown_h, off_y)
    left, right = _cut(width, shown_w, off_x)
    return Crop(top, bottom, left, right) if min(top, bottom, left, right) >= 0 else Crop()


def _cut(stored: int, shown: Fraction, offset: Fraction) -> tuple[int, int]:
    """Return the pixels before and behind the shown ones in a row; negative ones if these are not within it."""
    first = Fraction(stored - 1, 2) + offset - (shown - 1) / 2
    last = first + shown - 1
    return (int(first), stored - 1 - int(last)) if 0 <= first <= last <= stored - 1 else (-1, -1)


def _elements(file: BinaryIO, span: _Span) -> Iterator[tuple[int, _Span]]:
    """Yield the number and the content of each element of Matroska."""
    start, end = span
    for _ in range(_MOST):
        head = _read(file, start, 12) if start < end else b""
        name = 9 - head[0].bit_length() if head else 0
        length = 9 - head[name].bit_length() if 0 < name < len(head) else 9
        inner = name + length
        if name > 4 or length > 8 or len(head) < inner:
            return
        most = (1 << 7 * length) - 1
        size = int.from_bytes(head[name:inner]) & most
        stop = end if size == most else min(start + inner + size, end)  # all bits: unknown, up to the end
        yield int.from_bytes(head[:name]), (start + inner, stop)
        start = stop


def _matroska_crop(file: BinaryIO, span: _Span, place: int) -> Crop:
    segment = next((inner for number, inner in _elements(file, span) if number == _SEGMENT), None)
    for number, inner in _elements(file, segment) if segment is not None else ():
        if number == _CLUSTER:
            break
        if number != _TRACKS:
            continue
        videos = (
            found[_VIDEO]
            for number, track in _elements(file, inner)
            if number == _TRACK and _VIDEO in (found := dict(_elements(file, track))) and _TRACK_TYPE in found
            if _number(file, found[_TRACK_TYPE]) == 1
        )
        for at, video in enumerate(videos):
            if at == place:
                values = dict(_elements(file, video))
                return Crop(*(_number(file, values[crop]) if crop in values else 0 for crop in _CROPS))
    return Crop()


def _number(file: BinaryIO, span: _Span) -> int:
    return int.from_bytes(_read(file, span[0], min(span[1] - span[0], 8)))


def _asf_joined(file: BinaryIO, span: _Span) -> bool:
    start, end = span
    for place in range(_MOST):
        head = _read(file, start, 24) if start < end else b""
        if len(head) < 24 or (size := int.from_bytes(head[16:], "little")) < 24:
            return False
        if place and head[:16] == _ASF_HEADER:
            return True
        start += size
    return False


def _flv_joined(file: BinaryIO, span: _Span) -> bool:
    start = int.from_bytes(_read(file, 5, 4)) + 4  # the length of the header, and that of the tag before the first
    for _ in range(_TAGS):
        head = _read(file, start, 4) if start < span[1] else b""
        if head[:3] == b"FLV":
            return True
        if len(head) < 4 or head[0] & 0x1F not in (8, 9, 18):  # sound, video, data
            return False
        start += 11 + int.from_bytes(head[1:]) + 4
    return False
