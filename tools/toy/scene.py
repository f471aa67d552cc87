"""Render clips of "a {colour} {shape} moves {direction}", and measure what a clip shows.

Numpy only. Videos are float32 arrays (T, H, W, C) in [0, 1]; positions and sizes are in pixels, x right and y down.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NUM_FRAMES = 17
SIZE = 64
FPS = 8
BACKGROUND = 0.16
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.90, 0.20),
    "magenta": (0.90, 0.20, 0.90),
    "cyan": (0.20, 0.90, 0.90),
}
SHAPES = ("circle", "square", "triangle")
# Half of a shape's width, in pixels, by the word for it; and ranges of it around these, for the autoencoder.
RADII: dict[str | None, float] = {None: 10.0, "big": 14.0}
FREE_RADII: dict[str | None, tuple[float, float]] = {None: (8.0, 12.0), "small": (7.5, 9.0), "big": (12.0, 14.0)}
BIG = 24.0  # pixels: the height from which a shape is big
# `render` draws a square nine tenths as wide as its radius says, with about the area of the circle. Where shapes have
# one place and size of few, it is as wide as the circle: then their latents differ more than those of near places.
WIDER_SQUARE = 1.1
LANES, FIRST_LANE, LANE, TRAVEL = 5, 16.0, 8.0, 32.0  # lanes one latent apart; all shapes cross half of the frame
LAND_HEIGHT = 8  # pixels of a strip at the bottom: one row of latents
LAND_GREENS = (0.75, 1.0)  # of it, for the autoencoder
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Clip:
    """One moving shape: colour, shape, direction and perhaps size as in its caption, radius, place and speed."""

    colour: str
    shape: str
    direction: str
    radius: float  # half of the shape's extent
    start: tuple[float, float]  # centre in the first frame, x and y
    travel: float  # distance between the first and the last centre
    size: str | None = None  # "small", "big", or not said

    @property
    def caption(self) -> str:
        """The sentence that the text encoder reads."""
        return caption(self.colour, self.shape, self.direction, self.size)


@dataclass(frozen=True)
class Measurement:
    """Recognised content of a clip; None if not recognised."""

    colour: str | None
    shape: str | None
    direction: str | None
    size: str | None  # the word that fits better
    travel: float


def caption(colour: str, shape: str, direction: str, size: str | None = None) -> str:
    """Return the sentence for a combination, and a size if it is said."""
    return f"a {f'{size} ' if size else ''}{colour} {shape} moves {direction}"


def combinations(*, held_out: bool) -> list[tuple[str, str, str]]:
    """Return the (colour, shape, direction) combinations of the training set, or those held out of it.

    Two of the twelve combinations of each colour are held out. Each pair of (colour, shape), (colour, direction) and
    (shape, direction) stays in the training set, so a held-out caption asks for composition only.
    """
    names = [(colour, shape, direction) for colour in COLOURS for shape in SHAPES for direction in DIRECTIONS]
    hidden = set()
    for i, colour in enumerate(COLOURS):
        for k in range(2):
            hidden.add((colour, SHAPES[(i + k) % len(SHAPES)], list(DIRECTIONS)[(i + i // 4 + 2 * k) % 4]))
    return [name for name in names if (name in hidden) == held_out]


def lattice_clip(combination: tuple[str, str, str], across: int, size: str | None = None) -> Clip:
    """Return a clip of the world that the transformers know: `across` in 0..`LANES` - 1 is the lane that it moves in.

    A shape crosses half of the frame, by one latent (8 pixels) per latent frame.
    """
    colour, shape, direction = combination
    radius = RADII[size] * (WIDER_SQUARE if shape == "square" else 1.0)
    step = DIRECTIONS[direction]
    lane = FIRST_LANE + LANE * across
    start = [lane if s == 0 else (SIZE - s * TRAVEL) / 2 for s in step]
    return Clip(colour, shape, direction, radius, (start[0], start[1]), TRAVEL, size)


def lattice(combos: Iterable[tuple[str, str, str]]) -> Iterator[Clip]:
    """Yield every clip of the world of the transformers that shows one of `combos`."""
    for combination, size, across in itertools.product(combos, RADII, range(LANES)):
        yield lattice_clip(combination, across, size)


def random_clip(combination: tuple[str, str, str], rng: np.random.Generator, size: str | None = None) -> Clip:
    """Draw a lane for a combination."""
    return lattice_clip(combination, int(rng.integers(LANES)), size)


def free_clip(combination: tuple[str, str, str], rng: np.random.Generator, size: str | None = None) -> Clip:
    """Draw radius (of that size), place and speed for a combination, for the autoencoder, which sees all of them."""
    colour, shape, direction = combination
    radius = float(rng.uniform(*FREE_RADII[size]))
    travel = float(rng.uniform(20.0, 30.0))
    low, high = radius + 2.0, SIZE - radius - 2.0
    step = DIRECTIONS[direction]
    start = [float(rng.uniform(low - min(0, s) * travel, high - max(0, s) * travel)) for s in step]
    return Clip(colour, shape, direction, radius, (start[0], start[1]), travel, size)


def random_clips(
    combos: list[tuple[str, str, str]], rng: np.random.Generator, sizes: Sequence[str | None] = (None,)
) -> Iterator[Clip]:
    """Yield clips endlessly: all combinations in random order, then again, each time with the next of `sizes`."""
    for size in itertools.cycle(sizes):
        for i in rng.permutation(len(combos)):
            yield random_clip(combos[i], rng, size)


def render(clip: Clip) -> np.ndarray:
    """Render a clip with anti-aliased edges; returns (T, H, W, C) float32 in [0, 1]."""
    step = DIRECTIONS[clip.direction]
    moved = np.linspace(0.0, clip.travel, NUM_FRAMES)
    grid = np.arange(SIZE) + 0.5
    dx = (grid[None, None, :] - (clip.start[0] + step[0] * moved)[:, None, None]).astype(np.float32)
    dy = (grid[None, :, None] - (clip.start[1] + step[1] * moved)[:, None, None]).astype(np.float32)
    # The signed distance to the outline approximates the covered part of a pixel.
    covered = np.clip(0.5 - _signed_distance(clip.shape, dx, dy, clip.radius), 0.0, 1.0)[..., None]
    colour = np.asarray(COLOURS[clip.colour], dtype=np.float32)
    return (covered * colour + (1.0 - covered) * BACKGROUND).astype(np.float32)


def with_land(video: np.ndarray, colour: Sequence[float]) -> np.ndarray:
    """Return `video` (T, H, W, C) with a strip of land at the bottom, in front of what it shows."""
    video = video.copy()
    video[:, -LAND_HEIGHT:] = colour
    return video


def _signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    if shape == "circle":
        return np.sqrt(dx**2 + dy**2) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    # An isosceles triangle that points up: its base, and one slanted side mirrored.
    normal = np.asarray([2.0, -1.0]) / math.sqrt(5.0)
    return np.maximum(dy - radius, np.abs(dx) * normal[0] + (dy + radius) * normal[1])


def around(video: np.ndarray, margin: int = 4) -> np.ndarray:
    """Return the pixels of the shape in `video` (T, H, W, C), and those up to `margin` from it: bool (T, H, W)."""
    near = np.abs(video - BACKGROUND).max(axis=-1) > 0.05
    for axis in (1, 2):
        for _ in range(margin):
            before, after = ((slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None)))
            wider = near.copy()
            wider[after] |= near[before]
            wider[before] |= near[after]
            near = wider
    return near


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of two arrays in [0, 1]."""
    error = float(np.mean((np.asarray(video, dtype=np.float64) - reference) ** 2))
    return math.inf if error == 0 else -10.0 * math.log10(error)


def measure(video: np.ndarray) -> Measurement:
    """Measure colour, shape and direction of the one moving shape in `video` (T, H, W, C) in [0, 1]."""
    difference = np.abs(video - BACKGROUND).max(axis=-1)
    mask = difference > 0.3
    visible = mask.sum(axis=(1, 2)) >= 40
    if visible.mean() < 0.75:
        return Measurement(None, None, None, None, 0.0)
    direction, travel = _measure_direction(difference * mask, visible)
    shape, height = _measure_shape(mask[visible])
    size = "big" if height > BIG else None
    return Measurement(_measure_colour(video, mask), shape, direction, size, travel)


def _measure_colour(video: np.ndarray, mask: np.ndarray) -> str | None:
    mean = np.median(video[mask], axis=0)
    distances = {name: float(np.linalg.norm(mean - np.asarray(rgb))) for name, rgb in COLOURS.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] < 0.35 else None


def _measure_direction(weights: np.ndarray, visible: np.ndarray) -> tuple[str | None, float]:
    grid = np.arange(SIZE) + 0.5
    frames = np.flatnonzero(visible)
    total = weights[frames].sum(axis=(1, 2))
    x = (weights[frames].sum(axis=1) @ grid) / total
    y = (weights[frames].sum(axis=2) @ grid) / total
    # The slope of a straight line through the centres, over the whole clip.
    moved = np.asarray([np.polyfit(frames, centre, 1)[0] * (NUM_FRAMES - 1) for centre in (x, y)])
    main, other = np.abs(moved).max(), np.abs(moved).min()
    if main < 8.0 or other > 0.5 * main:
        return None, float(main)
    step = tuple(int(np.sign(m)) if abs(m) == main else 0 for m in moved)
    return next(name for name, vector in DIRECTIONS.items() if vector == step), float(main)


def _measure_shape(mask: np.ndarray) -> tuple[str, float]:
    """Return the shape and its height in pixels."""
    fills, tops, heights = [], [], []
    for frame in mask:
        rows, columns = np.flatnonzero(frame.any(axis=1)), np.flatnonzero(frame.any(axis=0))
        box = frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        fills.append(box.mean())
        tops.append(box[: max(1, len(box) // 4)].mean())
        heights.append(len(box))
    # A square fills its bounding box, a circle pi/4 of it, a triangle half of it and least at its top.
    fill, top, height = (float(np.median(values)) for values in (fills, tops, heights))
    if fill > 0.89:
        return "square", height
    return "triangle" if fill < 0.68 and top < 0.4 else "circle", height
