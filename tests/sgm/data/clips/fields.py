"""Interlaced H.264 with one field per picture (PAFF), which no encoder of FFmpeg writes: uncompressed macroblocks."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIDE = 64  # of a frame; a field has half the height


class _Bits(list[int]):
    def add(self, *values_and_lengths: int) -> None:
        """Append numbers of fixed lengths: value, length, value, length, ..."""
        for value, length in zip(values_and_lengths[::2], values_and_lengths[1::2], strict=True):
            self += [value >> place & 1 for place in reversed(range(length))]

    def golomb(self, *values: int) -> None:
        """Append numbers in Exp-Golomb code."""
        for value in values:
            self.add(value + 1, 2 * (value + 1).bit_length() - 1)

    def align(self, bit: int = 0) -> None:
        self += [bit] * (-len(self) % 8)

    def unit(self, kind: int) -> bytes:
        """Return a NAL unit. The values of the samples below need no emulation prevention."""
        self.append(1)
        self.align()
        return b"\0\0\0\1" + bytes([0x60 | kind]) + np.packbits(self).tobytes()


def h264_fields(levels: Sequence[int]) -> bytes:
    """Return a stream with a grey frame of each level, in two fields."""
    sequence, parameters = _Bits(), _Bits()
    sequence.add(77, 8, 0, 8, 30, 8)  # main profile, level 3
    sequence.golomb(0, 4, 2, 1)  # 8 bits of frame_num, order of decoding, one reference
    sequence.add(0, 1)
    sequence.golomb(SIDE // 16 - 1, SIDE // 32 - 1)
    sequence.add(0, 1, 0, 1, 1, 1, 0, 1, 0, 1)  # frame_mbs_only_flag is the first of them
    parameters.golomb(0, 0)
    parameters.add(0, 1, 0, 1)
    parameters.golomb(0, 0, 0)
    parameters.add(0, 3)
    parameters.golomb(0, 0, 0)
    parameters.add(0b100, 3)  # the deblocking filter is set by slices
    stream = sequence.unit(7) + parameters.unit(8)
    for number, level in enumerate(levels):
        for field in (0, 1):
            first = number == field == 0
            picture = _Bits()
            picture.golomb(0, 7, 0)  # all slices are of kind I
            picture.add(number, 8, 1, 1, field, 1)  # field_pic_flag, bottom_field_flag
            picture.golomb(*[0] * first)
            picture.add(0, 2 if first else 1)
            picture.golomb(0, 1)  # without deblocking
            for _ in range(SIDE // 16 * SIDE // 32):
                picture.golomb(25)  # I_PCM
                picture.align()
                picture += np.unpackbits(np.array([level] * 256 + [128] * 128, np.uint8)).tolist()
            stream += picture.unit(5 if first else 1)
    return stream


def write_fields(path: Path, levels: Sequence[int], rate: int = 25) -> None:
    """Write `h264_fields` with `rate` frames a second into the container that the suffix of `path` names."""
    source = av.open(io.BytesIO(h264_fields(levels)), "r", format="h264")
    with source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux() if packet.size):
            packet.stream, packet.time_base, packet.duration = stream, Fraction(1, 2 * rate), 1
            packet.pts = packet.dts = number
            target.mux(packet)
