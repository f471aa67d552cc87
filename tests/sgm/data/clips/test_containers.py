"""sgm.data.clips.containers: what headers say, and hostile ones."""

import io
import random
import struct
import time

import pytest

from sgm.data.clips.containers import Crop, Header, read_header
from tests.sgm.data.clips.boxes import box

MOVIE, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")


def movie(*, number=7, version=0, clean=b"", edits=b"", entry_size=None):
    """An index with a track of sound and one of video, 96x64."""
    entry = box(b"avc1", bytes(24) + struct.pack(">HH", 96, 64) + bytes(50) + clean)
    entry = struct.pack(">I", len(entry) if entry_size is None else entry_size) + entry[4:]
    tables = box(b"stbl", box(b"stsd", struct.pack(">II", 0, 1) + entry))
    times = (12, 20)[version]
    tkhd = box(b"tkhd", bytes([version]) + bytes(times - 1) + struct.pack(">I", number) + bytes(60))
    media = box(b"mdia", box(b"mdhd", bytes(24)) + box(b"minf", tables))
    sound = box(b"trak", box(b"tkhd", bytes(12) + struct.pack(">I", 1) + bytes(68)))
    return box(b"moov", box(b"mvhd", bytes(100)) + sound + box(b"trak", tkhd + box(b"edts", edits) + media))


APERTURE = box(b"clap", struct.pack(">8i", 80, 1, 48, 1, 0, 1, 0, 1))
CROPPED = Header(Crop(8, 8, 8, 8))


def header(data, form=MOVIE, *, track=7, place=0):
    return read_header(io.BytesIO(data), form, track=track, place=place)


@pytest.mark.parametrize(
    "data",
    [
        movie(clean=APERTURE),
        movie(clean=APERTURE, version=1),
        movie(clean=box(b"pasp", bytes(8)) + APERTURE),
        movie(clean=APERTURE, entry_size=0),  # up to the end
        box(b"ftyp", b"isom") + struct.pack(">I4sQ", 1, b"mdat", 24) + bytes(8) + movie(clean=APERTURE),
        movie(clean=APERTURE) + struct.pack(">I4s", 0, b"mdat") + movie(),
        movie(clean=APERTURE) + box(b"moof", b"") + movie(),
        movie(clean=APERTURE) + struct.pack(">I4s", 2**31, b"free") + movie(),
    ],
)
def test_the_aperture_of_a_track_is_read(data):
    assert header(data) == CROPPED and header(data, track=1) == Header()


@pytest.mark.parametrize(
    ("numbers", "crop"),
    [
        ((80, 1, 48, 1, 1, 2, -3, 1), Crop(5, 11, 8, 8)),
        ((161, 2, 48, 1, 0, 1, 0, 1), Crop(8, 8, 7, 8)),
        ((96, 1, 64, 1, 0, 1, 0, 1), Crop()),
        ((96, 1, 65, 1, 0, 1, 0, 1), Crop()),
        ((80, 0, 48, 1, 0, 1, 0, 1), Crop()),
        ((-80, 1, 48, 1, 0, 1, 0, 1), Crop()),
        ((0, 1, 0, 1, 0, 1, 0, 1), Crop()),
        ((2**31 - 1, 1, 48, 1, 0, 1, 0, 1), Crop()),
    ],
)
def test_an_aperture_is_rounded_as_by_ffmpeg_or_passed_over(numbers, crop):
    assert header(movie(clean=box(b"clap", struct.pack(">8i", *numbers)))).crop == crop


def test_edits_of_64_bits_are_read():
    entries = struct.pack(">QqI", 100, -1, 0) + struct.pack(">QqI", 100, 2**40, 1 << 16)
    one = box(b"elst", struct.pack(">II", 1 << 24, 2) + entries)
    assert header(movie(edits=one)) == Header()
    many = box(b"elst", struct.pack(">II", 1 << 24, 2**32 - 1) + entries + struct.pack(">QqI", 9, 5, 1 << 16))
    assert header(movie(edits=many)) == Header(is_edited=True), "no more than there are"
    fast = box(b"elst", struct.pack(">II", 1 << 24, 1) + struct.pack(">QqI", 100, 0, 3 << 15))
    assert "at 1.5 times its speed" in str(header(movie(edits=fast)).fault)


def element(number, content):
    return number.to_bytes(-(-number.bit_length() // 8)) + (len(content) | 1 << 56).to_bytes(8) + content


def matroska(*tracks, after=b""):
    return element(0x1A45DFA3, b"") + element(0x18538067, element(0x1654AE6B, b"".join(tracks)) + after)


def track(kind, *crops):
    video = element(0xE0, b"".join(element(number, bytes([value])) for number, value in crops))
    return element(0xAE, element(0x83, bytes([kind])) + video)


def test_cropping_is_that_of_the_video_in_its_place():
    crops = (0x54BB, 1), (0x54AA, 2), (0x54DD, 4)
    data = matroska(track(2, (0x54BB, 9)), track(1), track(1, *crops))
    assert [header(data, MATROSKA, place=place).crop for place in (0, 1, 2)] == [Crop(), Crop(1, 2, 0, 4), Crop()]
    cluster = element(0x18538067, element(0x1F43B675, b"") + element(0x1654AE6B, track(1, *crops)))
    assert header(cluster, MATROSKA) == Header(), "what comes behind frames is not sought"
    unknown = data[:16] + b"\x01" + b"\xff" * 7 + data[24:]  # the size of the segment
    assert header(unknown, MATROSKA, place=1).crop == Crop(1, 2, 0, 4)


def asf(*sizes):
    return b"".join(
        (ASF_HEADER if not n else bytes(16)) + s.to_bytes(8, "little") + bytes(16) for n, s in enumerate(sizes)
    )


HOSTILE = {
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "boxes of 8 bytes": box(b"free", b"") * 20_000,
    "of no size": struct.pack(">I4sQ", 1, b"moov", 0) * 100,
    "of 2^64 bytes": struct.pack(">I4sQ", 1, b"moov", 2**64 - 1) * 100,
    "smaller than their heads": struct.pack(">I4s", 7, b"moov") * 100,
    "nested": struct.pack(">I4s", 0, b"moov") + struct.pack(">I4s", 0, b"trak") * 3000,
    "empty elements": element(0x18538067, b"\xae\x80" * 20_000),
    "nested elements": (b"\x18\x53\x80\x67\xff" + b"\x16\x54\xae\x6b\xff" + b"\xae\xff" * 3000),
    "objects of no size": asf(40, 0),
    "objects of 2^64 bytes": asf(40, 2**64 - 1),
    "tags": b"FLV\x01\x05" + struct.pack(">II", 9, 0) + bytes([9]) * 20_000,
    "a far first tag": b"FLV\x01\x05" + struct.pack(">II", 2**32 - 1, 0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_say_nothing_in_no_time(name):
    start = time.process_time()
    for form in (MOVIE, MATROSKA, "asf", "flv", "avi"):
        assert header(HOSTILE[name], form) == Header()
    assert time.process_time() - start < 1


@pytest.mark.parametrize("form", [MOVIE, MATROSKA, "asf", "flv"])
def test_damaged_headers_raise_nothing(form):
    draw = random.Random(0)
    whole = {
        MOVIE: movie(clean=APERTURE, edits=box(b"elst", struct.pack(">IIIiI", 0, 1, 100, 0, 1 << 16))),
        MATROSKA: matroska(track(1, (0x54BB, 1))),
        "asf": asf(40, 40, 40),
        "flv": b"FLV\x01\x05" + struct.pack(">II", 9, 0) + (b"\x09\0\0\x01" + bytes(8) + struct.pack(">I", 12)) * 3,
    }[form]
    for length in range(len(whole)):
        header(whole[:length], form)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(len(whole))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        header(bytes(damaged), form)
