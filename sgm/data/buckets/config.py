"""Parse the buckets of the configuration: a list, a cross product, or resolution classes."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sgm.config.values import spelled
from sgm.config.yaml_files import ConfigError, Problem
from sgm.data.buckets.assign import PATH, Bucket, Buckets, ClassBuckets, FixedBuckets, Rule, SizeClass
from sgm.data.buckets.resolutions import AREAS, class_sizes
from sgm.data.clips.frames import TIME_COMPRESSION
from sgm.util import InputError, nearest

_SIDES = ("frames", "heights", "widths")
_PRODUCT = (*_SIDES, "batch_size")
_ENTRY = ("shape", "batch_size")
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")


def parse_buckets(value: Any) -> Buckets:
    """Return the buckets that ``data.params.buckets`` describes.

    Args:
        value: ``["49x480x720", {"shape": "17x256x256", "batch_size": 4}]``, ``{"frames": [...], "heights": [...],
            "widths": [...], "batch_size": n}``, or ``{"480p": {37: [keep, batch_size], 53: [[keep, keep_frames],
            batch_size]}}``.

    Raises:
        ConfigError: lists all problems.
    """
    parser = _Parser()
    if isinstance(value, list):
        buckets = parser.listed(value)
    elif isinstance(value, Mapping) and any(key in _PRODUCT for key in value):
        buckets = parser.product(value)
    elif isinstance(value, Mapping) and value:
        buckets = parser.classes(value)
    else:
        cure = 'give a list such as [49x480x720], {frames: ..., heights: ..., widths: ...}, or {"480p": {49: [1.0, 1]}}'
        raise ConfigError([Problem(PATH, "", f"is {spelled(value)}", cure)])
    if parser.problems:
        raise ConfigError(parser.problems)
    return buckets


class _Parser:
    """Parses each form and collects problems; results are only valid without problems."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def _add(self, place: str, found: str, cure: str) -> None:
        self.problems.append(Problem(place, "", found, cure))

    def listed(self, entries: Sequence[Any]) -> FixedBuckets:
        if not entries:
            self._add(PATH, "is empty", "list shapes as FxHxW, e.g. [49x480x720]; null trains without buckets")
        buckets, places = [], []
        for index, entry in enumerate(entries):
            place = f"{PATH}.{index}"
            self._known_keys(entry, _ENTRY, place)
            section = entry if isinstance(entry, Mapping) else {"shape": entry}
            match = _SHAPE.fullmatch(str(section.get("shape")))
            if match is None:
                self._add(place, f"is {spelled(entry)}", "give frames, height and width as FxHxW, e.g. 49x480x720")
                continue
            frames, height, width = map(int, match.groups())
            self._check_frames(frames, place)
            buckets.append(Bucket(frames, height, width, self._batch_size(section.get("batch_size"), place)))
            places.append(place)
        return self._fixed(buckets, places)

    def product(self, section: Mapping[Any, Any]) -> FixedBuckets:
        self._known_keys(section, _PRODUCT, PATH)
        sides = [self._numbers(section.get(name), f"{PATH}.{name}") for name in _SIDES]
        for frames in sides[0]:
            self._check_frames(frames, f"{PATH}.frames")
        batch_size = self._batch_size(section.get("batch_size"), f"{PATH}.batch_size")
        buckets = [Bucket(f, height, width, batch_size) for f, height, width in itertools.product(*sides)]
        return self._fixed(buckets, [PATH] * len(buckets))

    def _fixed(self, buckets: Sequence[Bucket], places: Sequence[str]) -> FixedBuckets:
        seen: dict[tuple[int, int, int], str] = {}
        for bucket, place in zip(buckets, places, strict=True):
            if min(bucket.shape) < 1:
                self._add(place, f"{bucket} has a side of 0", "give frames, height and width above 0")
            elif bucket.shape in seen:
                self._add(place, f"{bucket} is given twice, as {seen[bucket.shape]} too", "remove one")
            seen.setdefault(bucket.shape, place)
        return FixedBuckets(tuple(buckets), tuple(places))

    def classes(self, section: Mapping[Any, Any]) -> ClassBuckets:
        found: dict[str, SizeClass] = {}
        for key, rules in section.items():
            name, place = str(key), f"{PATH}.{key}"
            try:
                sizes = class_sizes(name)
            except InputError as error:
                self._add(place, str(error), "name one of them")
                continue
            if name in found:
                self._add(place, "is given twice", "put its frame counts together")
            if not isinstance(rules, Mapping) or not rules:
                cure = "give frame counts, each with [probability, batch size]: {49: [1, 1]}"
                self._add(place, f"is {spelled(rules)}", cure)
                continue
            parsed = [rule for frames, entry in rules.items() if (rule := self._rule(frames, entry, place))]
            parsed.sort(key=lambda rule: -rule.frames)
            found[name] = SizeClass(name, AREAS[name], sizes, tuple(parsed))
        if found and not any(rule.keep > 0 and rule.keep_frames > 0 for c in found.values() for rule in c.rules):
            self._add(PATH, "keeps no clip: every probability is 0", "raise one of them")
        return ClassBuckets(tuple(found.values()))

    def _rule(self, frames: Any, entry: Any, place: str) -> Rule | None:
        place = f"{place}.{frames}"
        if not _is_count(frames):
            self._add(place, "is not a number of frames", "give 1 (pictures), 5, 9, ..., 49, ...")
            return None
        self._check_frames(frames, place)
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            cure = "give [probability, batch size], or [[probability, p_t], batch size]"
            self._add(place, f"is {spelled(entry)}", cure)
            return None
        given, batch_size = entry
        probabilities = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given, 1.0]
        if len(probabilities) != 2 or not all(_is_probability(p) for p in probabilities):
            self._add(place, f"has the probability {spelled(given)}", "give a number from 0 to 1, or two: [p, p_t]")
            return None
        keep, keep_frames = map(float, probabilities)
        if frames == 1 and keep_frames != 1:
            self._add(place, "has two probabilities, and pictures have one length", "give one probability")
        if batch_size == 0 and keep == 0:
            return Rule(frames, keep, keep_frames, 0)
        return Rule(frames, keep, keep_frames, self._batch_size(batch_size, place, needed=True) or 0)

    def _known_keys(self, section: Any, known: Sequence[str], place: str) -> None:
        for key in section if isinstance(section, Mapping) else ():
            if key not in known:
                cure = f"remove it, or write one of: {', '.join(known)}"
                self._add(f"{place}.{key}", f"unknown key{nearest(str(key), list(known))}", cure)

    def _check_frames(self, frames: int, place: str) -> None:
        if frames % TIME_COMPRESSION != 1:
            below = max(frames - 1, 0) // TIME_COMPRESSION * TIME_COMPRESSION + 1
            cure = f"the VAE takes 4k + 1 frames: give {below} or {below + TIME_COMPRESSION}"
            self._add(place, f"{frames} frames cannot be encoded", cure)

    def _numbers(self, value: Any, place: str) -> list[int]:
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(_is_count(number) for number in numbers):
            self._add(
                place, "is missing" if value is None else f"is {spelled(value)}", "give whole numbers above 0: [...]"
            )
            return []
        for number in sorted({n for n in numbers if numbers.count(n) > 1}):
            self._add(place, f"names {number} twice", "remove one")
        return list(dict.fromkeys(numbers))

    def _batch_size(self, value: Any, place: str, *, needed: bool = False) -> int | None:
        if (value is None and not needed) or _is_count(value):
            return value
        self._add(place, f"has the batch size {spelled(value)}", "give a whole number above 0")
        return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
