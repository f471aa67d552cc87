"""Buckets: the shapes that clips are brought to, and which clip goes to which; see docs/buckets.md.

Everything here is arithmetic on arrays over the clips; nothing is opened, and nothing random is drawn.

Legend: N clips, K random numbers a clip, F frames, H W pixels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from sgm.config.yaml_files import ConfigError, Problem
from sgm.data.clips.frames import MAX_FPS, MIN_FPS
from sgm.data.rows import VideoInfo
from sgm.modules.geometry import Geometry

PATH = "data.params.buckets"  # in YAML
NOWHERE = -1  # the bucket of a clip that has none
MIN_AREA = 0.8  # share of a class's area that a clip must have, else it would be blown up
# Buckets whose shape is this near to the nearest one, in e-folds of height / width, count as equally near.
_SAME_ASPECT = 0.05


@dataclass(frozen=True)
class Bucket:
    """A shape, and how many samples of it a rank takes at a time; None stands for the micro batch of the run."""

    frames: int
    height: int
    width: int
    batch_size: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(F, H, W)."""
        return self.frames, self.height, self.width

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class ClipSizes:
    """What decides about the buckets of N clips, each an array (N,).

    Attributes:
        frames: how many the clip gives at the frame rate of training, 1 for a picture; 0 where it cannot be used.
        heights: in pixels.
        widths: in pixels.
    """

    frames: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)

    def distinct(self) -> tuple["ClipSizes", np.ndarray]:
        """Return the sizes that there are, each once, and the index among them of each clip's: data sets have few."""
        keys = np.stack([self.frames, self.heights, self.widths]).astype(np.int64)
        _, first, inverse = np.unique(
            (keys[0] << 42) + (keys[1] << 21) + keys[2], return_index=True, return_inverse=True
        )
        return ClipSizes(*(side[first] for side in keys)), inverse


def clip_sizes(infos: Sequence[VideoInfo | str], *, fps: float, skip: tuple[int, int]) -> ClipSizes:
    """Return what decides about the buckets of clips.

    Args:
        infos: what is known of each, or why it cannot be used; see `sgm.data.clips.index.clip_infos`.
        fps: frames per second that training takes.
        skip: source frames left out at the start and at the end.
    """
    rows = [(0, 0.0, 1, 1) if isinstance(i, str) else (i.num_frames, i.fps, i.height, i.width) for i in infos]
    counts, rates, heights, widths = np.array(rows, np.float64).reshape(-1, 4).T
    usable = counts - sum(skip)
    # As `sgm.data.clips.frames.select_frames` counts, which knows the time of every frame; here it is their mean rate.
    seconds = (usable - 0.5) / np.maximum(rates, MIN_FPS)
    frames = np.where(usable == 1, 1, np.floor((seconds + 1e-6) * fps) + 1)
    frames = np.where((usable >= 1) & (rates >= MIN_FPS) & (rates <= MAX_FPS), frames, 0)
    frames = np.where(counts == 1, 1, frames)
    return ClipSizes(*(side.astype(np.int64) for side in (frames, heights, widths)))


class Buckets(Protocol):
    """A set of buckets, with the rule by which clips are divided among them."""

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """All of them."""
        ...

    @property
    def num_draws(self) -> int:
        """K, the random numbers that decide about a clip; with 0 its bucket is always the same."""
        ...

    def choose(self, clips: ClipSizes, draws: np.ndarray) -> np.ndarray:
        """Return the index of each clip's bucket, or `NOWHERE`: (N,) int64.

        Args:
            clips: their sizes.
            draws: (N, K), uniform in [0, 1).
        """
        ...

    def reachable(self, clips: ClipSizes) -> np.ndarray:
        """Return whether each clip has a bucket for at least some random numbers: (N,) bool."""
        ...

    def fitted(self, geometry: Geometry) -> Self:
        """Return these buckets as far as a network can take them.

        Raises:
            ConfigError: it cannot take one that the configuration names.
        """
        ...


@dataclass(frozen=True)
class FixedBuckets:
    """A list of buckets. A clip goes to the longest that it fills, and among those to the nearest shape.

    Where a clip fills none, the shortest ones are taken. Of shapes that are about equally near, it is the largest that
    the clip need not be blown up for, or else the smallest.

    Args:
        buckets: the list.
        places: for each bucket, the part of the configuration that names it.
    """

    buckets: tuple[Bucket, ...]
    places: tuple[str, ...]
    num_draws: int = 0

    def choose(self, clips: ClipSizes, draws: np.ndarray) -> np.ndarray:
        """Return the index of each clip's bucket, or `NOWHERE`; see `Buckets`."""
        clips, inverse = clips.distinct()
        lengths = np.array(sorted({bucket.frames for bucket in self.buckets}))
        filled = lengths[(np.searchsorted(lengths, clips.frames, side="right") - 1).clip(0)]
        nearest = np.full(len(clips), np.inf)
        for bucket in self.buckets:
            distance = np.where(filled == bucket.frames, _distance(clips, bucket.height, bucket.width), np.inf)
            nearest = np.minimum(nearest, distance)
        # From the smallest to the largest: what remains is the largest that is small enough, or the smallest.
        chosen = np.full(len(clips), NOWHERE)
        for index in sorted(range(len(self.buckets)), key=lambda i: self.buckets[i].height * self.buckets[i].width):
            bucket = self.buckets[index]
            near = _distance(clips, bucket.height, bucket.width) <= nearest + _SAME_ASPECT
            covered = (clips.heights >= bucket.height) & (clips.widths >= bucket.width)
            taken = (clips.frames > 0) & (filled == bucket.frames) & near & (covered | (chosen == NOWHERE))
            chosen[taken] = index
        return chosen[inverse]

    def reachable(self, clips: ClipSizes) -> np.ndarray:
        """Return whether each clip can be used at all."""
        return clips.frames > 0

    def fitted(self, geometry: Geometry) -> Self:
        """Return these buckets; see `Buckets`."""
        problems = []
        for bucket, place in zip(self.buckets, self.places, strict=True):
            problems += frame_problems(bucket.frames, geometry, place)
            if not geometry.size_is_legal(bucket.height, bucket.width):
                height, width = geometry.nearest_size(bucket.height, bucket.width)
                found = f"{bucket}: {bucket.height}x{bucket.width} is no size that the network can take"
                problems.append(Problem(place, "", found, f"nearest legal: {height}x{width}; {size_rule(geometry)}"))
        if problems:
            raise ConfigError(problems)
        return self


@dataclass(frozen=True)
class Rule:
    """What a class does with clips that have at least so many frames.

    Attributes:
        frames: F; 1 is for pictures alone.
        keep: probability that a clip is taken, rather than handed to the next smaller class.
        keep_frames: probability that this number of frames is considered, rather than the next smaller one.
        batch_size: samples of a rank at a time.
    """

    frames: int
    keep: float
    keep_frames: float
    batch_size: int


@dataclass(frozen=True)
class SizeClass:
    """A class of resolutions.

    Attributes:
        name: of `sgm.data.buckets.resolutions`.
        area: nominal pixels.
        sizes: (H, W) of each shape.
        rules: one for each frame count, the largest first.
    """

    name: str
    area: int
    sizes: tuple[tuple[int, int], ...]
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class ClassBuckets:
    """Classes of resolutions, with the probability that a clip is kept in each; the rule is that of Open-Sora.

    Classes are tried from the largest area down. A clip must have `MIN_AREA` of it, and the class a frame count that
    the clip fills; the largest such count is taken, after each was given its chance to be passed over. Then the clip is
    kept with the probability that stands there, or goes to the next class. In a class, the nearest shape decides.

    Args:
        classes: in any order.
    """

    classes: tuple[SizeClass, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(sorted(self.classes, key=lambda entry: (-entry.area, entry.name))))

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """All of them, a class and a frame count after the other."""
        return tuple(
            Bucket(rule.frames, *size, rule.batch_size) for entry, rule in self._rules() for size in entry.sizes
        )

    @property
    def num_draws(self) -> int:
        """Two for each frame count of each class."""
        return 2 * sum(1 for _ in self._rules())

    def _rules(self) -> Iterator[tuple[SizeClass, Rule]]:
        return ((entry, rule) for entry in self.classes for rule in entry.rules)

    def choose(self, clips: ClipSizes, draws: np.ndarray) -> np.ndarray:
        """Return the index of each clip's bucket, or `NOWHERE`; see `Buckets`."""
        chosen, column, first = np.full(len(clips), NOWHERE), 0, 0
        distinct, inverse = clips.distinct()
        for entry in self.classes:
            waiting = (chosen == NOWHERE) & _large_enough(clips, entry)
            shapes = _nearest(distinct, entry.sizes)[inverse]
            for rule in entry.rules:
                considered = waiting & _long_enough(clips, rule) & (draws[:, column] < rule.keep_frames)
                kept = considered & (draws[:, column + 1] < rule.keep)
                chosen[kept] = first + shapes[kept]
                waiting &= ~considered  # shorter counts of this class are not tried
                column, first = column + 2, first + len(entry.sizes)
        return chosen

    def reachable(self, clips: ClipSizes) -> np.ndarray:
        """Return whether each clip has a bucket for at least some random numbers."""
        found = np.zeros(len(clips), bool)
        for entry in self.classes:
            waiting = _large_enough(clips, entry)
            for rule in entry.rules:
                considered = waiting & _long_enough(clips, rule) & (rule.keep_frames > 0)
                found |= considered & (rule.keep > 0)
                waiting &= ~(considered & (rule.keep_frames >= 1))
        return found

    def fitted(self, geometry: Geometry) -> Self:
        """Return the classes with those of their sizes that the network can take; see `Buckets`."""
        problems, classes = [], []
        for entry in self.classes:
            place = f"{PATH}.{entry.name}"
            for rule in entry.rules:
                problems += frame_problems(rule.frames, geometry, f"{place}.{rule.frames}")
            sizes = tuple(size for size in entry.sizes if geometry.size_is_legal(*size))
            classes.append(dataclasses.replace(entry, sizes=sizes))
            if not sizes:
                listed = ", ".join(f"{height}x{width}" for height, width in entry.sizes)
                found = f"has no size that the network can take; its sizes are {listed}"
                problems.append(Problem(place, "", found, f"take a class with smaller ones; {size_rule(geometry)}"))
        if problems:
            raise ConfigError(problems)
        return dataclasses.replace(self, classes=tuple(classes))


def frame_problems(frames: int, geometry: Geometry, place: str) -> list[Problem]:
    """Say what is wrong with a number of frames for a network, with the nearest that is right."""
    legal = geometry.legal_frames()
    if frames in legal:
        return []
    closest = min(legal, key=lambda count: abs(count - frames))
    step = geometry.time_compression * geometry.patch_size[0]
    cure = f"nearest legal: {closest}; legal: 1 + multiples of {step}, up to {legal[-1]}"
    return [Problem(place, "", f"{frames} frames are no length that the network can take", cure)]


def size_rule(geometry: Geometry) -> str:
    """Say which sizes a network can take."""
    (height, width), most = geometry.size_steps, geometry.max_size
    if geometry.fixed_size:
        return f"the {geometry.positions} positions of this network fit {most[0]}x{most[1]} only"
    return f"height: multiples of {height} up to {most[0]}, width: multiples of {width} up to {most[1]}"


def _distance(clips: ClipSizes, height: int, width: int) -> np.ndarray:
    """Return how far each clip's shape is from that of a bucket: the same for twice as wide and twice as tall."""
    return np.abs(np.log(clips.heights.clip(1) / clips.widths.clip(1)) - np.log(height / width))


def _nearest(clips: ClipSizes, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the index of the size that is nearest in shape to each clip; of equally near ones the first."""
    nearest, chosen = np.full(len(clips), np.inf), np.zeros(len(clips), np.int64)
    for index, size in enumerate(sizes):
        distance = _distance(clips, *size)
        chosen[distance < nearest] = index
        nearest = np.minimum(nearest, distance)
    return chosen


def _large_enough(clips: ClipSizes, entry: SizeClass) -> np.ndarray:
    return (clips.frames > 0) & (clips.heights.astype(np.int64) * clips.widths >= MIN_AREA * entry.area)


def _long_enough(clips: ClipSizes, rule: Rule) -> np.ndarray:
    return clips.frames == 1 if rule.frames == 1 else clips.frames >= rule.frames
