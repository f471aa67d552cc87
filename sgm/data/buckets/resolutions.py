"""Resolution classes: sizes of about the same area, one for each aspect ratio."""

import math
from fractions import Fraction

from sgm.util import InputError, nearest

STEP = 16  # pixels: the VAE shrinks by 8, and the network takes patches of 2x2

# Pixels of each class. Names with p, 2k and 4k are of 16:9 video; a plain number is the side of a square.
AREAS = {
    "144p": 36_864,
    "240p": 102_240,
    "256": 65_536,
    "360p": 230_400,
    "480p": 409_920,
    "512": 262_144,
    "720p": 921_600,
    "1024": 1_048_576,
    "1080p": 2_073_600,
    "2k": 3_686_400,
    "2048": 4_194_304,
    "2880": 8_294_400,
    "4k": 8_294_400,
}
# Height / width of landscape sizes; portrait sizes are these swapped.
ASPECTS = tuple(Fraction(*pair) for pair in [(1, 4), (1, 3), (3, 8), (3, 7), (1, 2), (9, 16), (5, 8), (2, 3), (3, 4)])
ASPECTS += (Fraction(4, 5), Fraction(1))
# Override: the size of the released CogVideoX-2B and 5B.
_RELEASED = {("480p", Fraction(2, 3)): (480, 720)}


def class_sizes(name: str) -> tuple[tuple[int, int], ...]:
    """Return the sizes (H, W) of a class, from the widest to the tallest; all sides are multiples of 16.

    Raises:
        InputError: unknown class.
    """
    if name not in AREAS:
        hint = nearest(name, list(AREAS))
        raise InputError(f"'{name}' is no class of resolutions; there are {', '.join(AREAS)}{hint}")
    wide = [_RELEASED.get((name, aspect)) or _size(AREAS[name], float(aspect)) for aspect in ASPECTS]
    tall = [(width, height) for height, width in reversed(wide)]
    return tuple(dict.fromkeys(wide + tall))


def _size(area: int, aspect: float) -> tuple[int, int]:
    height, width = math.sqrt(area * aspect), math.sqrt(area / aspect)
    return max(round(height / STEP), 1) * STEP, max(round(width / STEP), 1) * STEP
