"""Assign clips to buckets, the shapes (F, H, W) of training; see docs/buckets.md.

Pure array arithmetic: no file access, no random numbers drawn.

Legend: N clips, K random numbers per clip, F frames, H W pixels.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from sgm.config.yaml_files import ConfigError, Problem
from sgm.data.clips.frames import MAX_FPS
from sgm.data.rows import VideoInfo
from sgm.modules.geometry import Geometry

PATH = "data.params.buckets"  # in YAML
NOWHERE = -1  # the bucket index of a clip without a bucket
MIN_AREA = 0.8  # minimum clip area as a fraction of the class's area, to limit upscaling
# Buckets whose aspect ratio is this close to the nearest, in |log(height / width)|, count as equally near.
_SAME_ASPECT = 0.05


@dataclass(frozen=True)
class Bucket:
    """A shape, and the batch size of one rank; None is the micro batch size of the run."""

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
    """Lengths and sizes of N clips, each an array (N,)."""

    frames: np.ndarray  # at the frame rate of training; 1 for a picture, 0 for an unusable clip
    heights: np.ndarray  # in pixels
    widths: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)

    def distinct(self) -> tuple["ClipSizes", np.ndarray]:
        """Return the distinct sizes (few in most data sets), and the index of each clip's size among them."""
        sides = np.stack([self.frames, self.heights, self.widths]).astype(np.int64)
        keys = (sides[0] << 42) + (sides[1] << 21) + sides[2]
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        return ClipSizes(*(side[first] for side in sides)), inverse


def clip_sizes(infos: Sequence[VideoInfo | str], *, fps: float, skip: tuple[int, int]) -> ClipSizes:
    """Return lengths and sizes of clips for the assignment to buckets.

    Args:
        infos: metadata of each clip, or why it cannot be used; see `sgm.data.clips.index.clip_infos`.
        fps: frame rate of training.
        skip: source frames skipped at the start and at the end.
    """
    rows = [
        (0, 0.0, 0.0, 1, 1) if isinstance(i, str) else (i.num_frames, i.fps, i.duration, i.height, i.width)
        for i in infos
    ]
    counts, rates, durations, heights, widths = np.array(rows, np.float64).reshape(-1, 5).T
    usable, gaps = counts - sum(skip), 1 / np.maximum(rates, 1e-9)
    # As `sgm.data.clips.frames.select_frames`, but from the mean rate instead of all timestamps.
    seconds = durations - sum(skip) * gaps - np.minimum(gaps, 1 / fps) / 2
    frames = np.maximum(np.floor((seconds + 1e-6) * fps) + 1, 1)
    frames = np.where((usable >= 1) & (rates <= MAX_FPS), frames, 0)
    frames = np.where(counts == 1, 1, frames)
    return ClipSizes(*(side.astype(np.int64) for side in (frames, heights, widths)))


@dataclass(frozen=True)
class FixedBuckets:
    """A list of buckets. A clip gets the longest bucket that it fills, with the nearest aspect ratio.

    A clip that fills none gets the shortest. Among about equally near aspect ratios it gets the largest bucket without
    upscaling, else the smallest.
    """

    buckets: tuple[Bucket, ...]
    places: tuple[str, ...]  # path of each bucket in the configuration
    num_draws: int = 0  # K, random numbers that select the bucket of a clip; 0: deterministic

    def choose(self, clips: ClipSizes, draws: np.ndarray) -> np.ndarray:
        """Return the index of each clip's bucket, or `NOWHERE`: (N,) int64.

        Args:
            clips: their sizes.
            draws: (N, K), uniform in [0, 1).
        """
        clips, inverse = clips.distinct()
        lengths = np.array(sorted({bucket.frames for bucket in self.buckets}))
        filled = lengths[(np.searchsorted(lengths, clips.frames, side="right") - 1).clip(0)]
        nearest = np.full(len(clips), np.inf)
        for bucket in self.buckets:
            distance = np.where(filled == bucket.frames, _distance(clips, bucket.height, bucket.width), np.inf)
            nearest = np.minimum(nearest, distance)
        # By ascending area: the last one taken is the largest without upscaling, or the smallest.
        chosen = np.full(len(clips), NOWHERE)
        for index in sorted(range(len(self.buckets)), key=lambda i: self.buckets[i].height * self.buckets[i].width):
            bucket = self.buckets[index]
            near = _distance(clips, bucket.height, bucket.width) <= nearest + _SAME_ASPECT
            covered = (clips.heights >= bucket.height) & (clips.widths >= bucket.width)
            taken = (clips.frames > 0) & (filled == bucket.frames) & near & (covered | (chosen == NOWHERE))
            chosen[taken] = index
        return chosen[inverse]

    def reachable(self, clips: ClipSizes) -> np.ndarray:
        """Return whether each clip has a bucket for some random numbers: (N,) bool."""
        return clips.frames > 0

    def supported_by(self, geometry: Geometry) -> Self:
        """Return the buckets that a network supports: all of them.

        Raises:
            ConfigError: it does not support a configured bucket.
        """
        problems = []
        for bucket, place in zip(self.buckets, self.places, strict=True):
            problems += _frame_problems(bucket.frames, geometry, place)
            if not geometry.size_is_legal(bucket.height, bucket.width):
                height, width = geometry.nearest_size(bucket.height, bucket.width)
                found = f"{bucket}: {bucket.height}x{bucket.width} is no size that the network can take"
                problems.append(Problem(place, "", found, f"nearest legal: {height}x{width}; {_size_rule(geometry)}"))
        if problems:
            raise ConfigError(problems)
        return self


@dataclass(frozen=True)
class Rule:
    """How a class treats clips that have at least `frames` frames."""

    frames: int  # F; 1 is for pictures only
    keep: float  # probability that a clip is kept, instead of passed to the next smaller class
    keep_frames: float  # probability that this frame count is considered, instead of the next smaller one
    batch_size: int  # of one rank


@dataclass(frozen=True)
class SizeClass:
    """A resolution class."""

    name: str  # in `sgm.data.buckets.resolutions`
    area: int  # nominal pixels
    sizes: tuple[tuple[int, int], ...]  # (H, W) of each aspect ratio
    rules: tuple[Rule, ...]  # one per frame count, the largest first


@dataclass(frozen=True)
class ClassBuckets:
    """Resolution classes that keep clips with a probability (Open-Sora's rule).

    Classes are tried from the largest area down. A clip needs `MIN_AREA` of the area, and must fill a frame count of
    the class; the largest considered one is used. It is kept with the probability of that count, or passed to the next
    class. Within a class, the nearest aspect ratio decides. The methods are those of `FixedBuckets`.
    """

    classes: tuple[SizeClass, ...]  # from the largest area down

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(sorted(self.classes, key=lambda entry: (-entry.area, entry.name))))

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """All buckets, by class and frame count."""
        rules = ((entry, rule) for entry in self.classes for rule in entry.rules)
        return tuple(Bucket(rule.frames, *size, rule.batch_size) for entry, rule in rules for size in entry.sizes)

    @property
    def num_draws(self) -> int:
        """Two random numbers for each frame count of each class."""
        return 2 * sum(len(entry.rules) for entry in self.classes)

    def choose(self, clips: ClipSizes, draws: np.ndarray) -> np.ndarray:
        """Return the index of each clip's bucket, or `NOWHERE`."""
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
        """Return whether each clip has a bucket for some random numbers."""
        found = np.zeros(len(clips), bool)
        for entry in self.classes:
            waiting = _large_enough(clips, entry)
            for rule in entry.rules:
                considered = waiting & _long_enough(clips, rule) & (rule.keep_frames > 0)
                found |= considered & (rule.keep > 0)
                waiting &= ~(considered & (rule.keep_frames >= 1))
        return found

    def supported_by(self, geometry: Geometry) -> Self:
        """Return the classes with the sizes that a network supports."""
        problems, classes = [], []
        for entry in self.classes:
            place = f"{PATH}.{entry.name}"
            for rule in entry.rules:
                problems += _frame_problems(rule.frames, geometry, f"{place}.{rule.frames}")
            sizes = tuple(size for size in entry.sizes if geometry.size_is_legal(*size))
            classes.append(dataclasses.replace(entry, sizes=sizes))
            if not sizes:
                listed = ", ".join(f"{height}x{width}" for height, width in entry.sizes)
                found = f"has no size that the network can take; its sizes are {listed}"
                problems.append(Problem(place, "", found, f"take a class with smaller ones; {_size_rule(geometry)}"))
        if problems:
            raise ConfigError(problems)
        return dataclasses.replace(self, classes=tuple(classes))


Buckets = FixedBuckets | ClassBuckets


def _frame_problems(frames: int, geometry: Geometry, place: str) -> list[Problem]:
    """Return a problem with the nearest legal count if a network does not support a frame count."""
    if geometry.frames_are_legal(frames):
        return []
    legal = geometry.legal_frames()
    closest = min(legal, key=lambda count: abs(count - frames))
    step = geometry.time_compression
    cure = f"nearest legal: {closest}; legal: 1 + multiples of {step}, up to {legal[-1]}"
    if frames > legal[-1] and (frames - 1) % step == 0 and not geometry.fixed_size:
        cure += "; args.time_scaling=riflex allows longer ones"
    return [Problem(place, "", f"{frames} frames are no length that the network can take", cure)]


def _size_rule(geometry: Geometry) -> str:
    (height, width), largest = geometry.size_steps, geometry.max_size
    if geometry.fixed_size:
        return f"the {geometry.positions} positions of this network fit {largest[0]}x{largest[1]} only"
    return f"height: multiples of {height} up to {largest[0]}, width: multiples of {width} up to {largest[1]}"


def _distance(clips: ClipSizes, height: int, width: int) -> np.ndarray:
    """Return |log| of the ratio of each clip's aspect ratio to height / width."""
    return np.abs(np.log(clips.heights.clip(1) / clips.widths.clip(1)) - np.log(height / width))


def _nearest(clips: ClipSizes, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the index of the size nearest in aspect ratio to each clip; the first among equals."""
    return np.argmin([_distance(clips, *size) for size in sizes], axis=0)


def _large_enough(clips: ClipSizes, entry: SizeClass) -> np.ndarray:
    return (clips.frames > 0) & (clips.heights.astype(np.int64) * clips.widths >= MIN_AREA * entry.area)


def _long_enough(clips: ClipSizes, rule: Rule) -> np.ndarray:
    return clips.frames == 1 if rule.frames == 1 else clips.frames >= rule.frames
