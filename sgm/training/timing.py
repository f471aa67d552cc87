"""Where the time of a run goes, by phase; ranks that are slower than the others, and steps that do not end."""

import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import sgm.distributed
from sgm.log import get_logger
from sgm.parallel.heartbeat import Progress

logger = get_logger(__name__)

PHASES = ("data", "encode", "network", "communication", "save")  # in metrics
EVALUATE, OTHER = "evaluate", "other"  # not in metrics

_SLOW_FACTOR, _SLOW_SHARE = 2.0, 0.1  # of the median of the ranks; of the step
_DATA_SHARE = 0.3  # of the step: more is a hint
_LEAST_STALL, _FIRST_STALL, _STALL_FACTOR = 60.0, 600.0, 10.0  # seconds; of the longest of the last steps


class PhaseClock:
    """Add up the time of each phase on the timeline of a device.

    On an accelerator, whose work the host only enqueues, events mark where phases begin and end; they are read when the
    seconds are asked for. So data that is ready in time takes none, and data that the device waits for, what it waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.iteration = 0  # that others are told
        self._device = device
        self._stack = [OTHER]
        self._marks: list[tuple[str, Any]] = [(OTHER, self._now())]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Context: a phase, which interrupts the one around it."""
        self._stack.append(phase)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def _mark(self) -> None:
        self._marks.append((self._stack[-1], self._now()))
        sgm.distributed.report_progress(self.iteration, self._stack[-1])

    def _now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each of `PHASES` since the last call; waits for the device."""
        self._mark()
        marks, self._marks = self._marks, self._marks[-1:]
        on_device = self._device.type != "cpu"
        if on_device:
            marks[-1][1].synchronize()
        totals: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in itertools.pairwise(marks):
            if phase in totals:
                totals[phase] += start.elapsed_time(end) / 1000 if on_device else end - start
        return totals


def slow_ranks(
    ranks: Sequence[Mapping[str, float]], step: float, group: int = 1
) -> Iterator[tuple[int | None, str, str]]:
    """Yield what makes steps slow: rank (None for all), phase, and a sentence about them.

    Args:
        ranks: seconds of each phase in a step, by rank.
        step: seconds of a step.
        group: ranks that share a sample, of which the first reads and encodes it while the others wait: only the first
            ones are compared.
    """
    ranks = ranks[::group]
    # The lower one, so that of two ranks one can be slow; the higher one of waits, which are the others' symptom.
    medians = {phase: statistics.median_low(rank[phase] for rank in ranks) for phase in PHASES}
    medians["communication"] = statistics.median_high(rank["communication"] for rank in ranks)
    for phase in ("data", "encode", "save"):
        limit = _SLOW_FACTOR * medians[phase] + _SLOW_SHARE * step
        for number, rank in enumerate(ranks):
            if rank[phase] > limit:
                much = f"{rank[phase]:.2g} s of a step of {step:.2g} s in {phase}, the median is {medians[phase]:.2g} s"
                yield number * group, phase, f"rank {number * group} spends {much}: the others wait for it"
    waits = [rank["communication"] for rank in ranks]
    first = min(range(len(ranks)), key=lambda number: waits[number])
    if medians["communication"] - waits[first] > 2 * _SLOW_SHARE * step and not any(
        ranks[first][phase] > medians[phase] + _SLOW_SHARE * step for phase in ("data", "encode", "save")
    ):
        waiting = f"the others wait {medians['communication']:.2g} s of a step of {step:.2g} s for it"
        yield first * group, "network", f"rank {first * group} computes slower: {waiting}"
    if medians["data"] > _DATA_SHARE * step:
        cure = "raise args.num_workers, or encode clips and captions ahead with tools/prepare_dataset.py"
        yield None, "data", f"data takes {medians['data']:.2g} s of a step of {step:.2g} s: {cure}"


def stall_message(ranks: Sequence[Progress], seconds: float, usual: float | None) -> str:
    """Return which ranks hold up a step.

    Ranks of an earlier iteration do; among those of the same one, ranks that wait in a collective, or may, do not.

    Args:
        ranks: what each is doing.
        seconds: since the last step.
        usual: seconds of the longest of the last steps; None before the first.
    """
    waiting = {"communication": 2, "network": 1}
    last = min((each.iteration, waiting.get(each.phase, 0)) for each in ranks)
    guilty = [each for each in ranks if (each.iteration, waiting.get(each.phase, 0)) == last]
    names = ", ".join(each.name for each in guilty[:4]) + (f" and {len(guilty) - 4} more" if len(guilty) > 4 else "")
    if len(guilty) == len(ranks) > 1:
        names = f"all {len(ranks)} ranks"
    slowest = max(guilty, key=lambda each: each.seconds)
    have = "has" if len(guilty) == 1 else "have"
    others = "" if len(guilty) == len(ranks) else "; the others wait"
    usually = "the first one is not done" if usual is None else f"the last ones took up to {usual:.2g} s"
    return (
        f"no step has ended for {seconds:.0f} s ({usually}): {names} {have} been in {slowest.phase} of iteration "
        f"{slowest.iteration} for {slowest.seconds:.0f} s{others}"
    )


class StallWatch:
    """Warn of steps that take much longer than the last ones, and name rank and phase, while they last.

    Args:
        progress: returns what each rank is doing.
    """

    def __init__(self, progress: Callable[[], Sequence[Progress]]) -> None:
        self._progress = progress
        self._steps: deque[float] = deque(maxlen=20)
        self._last, self._warned = time.monotonic(), False
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def step_done(self) -> None:
        """Call after each step."""
        now = time.monotonic()
        self._steps.append(now - self._last)
        self._last, self._warned = now, False

    def start_again(self) -> None:
        """Call after work between steps that takes its time, such as an evaluation."""
        self._last, self._warned = time.monotonic(), False

    def _watch(self) -> None:
        while not self._closed.wait(1):
            if message := self.check(time.monotonic()):
                logger.warning("%s", message)

    def check(self, now: float) -> str | None:
        """Return a warning at this time; None without a stall, or if it is known."""
        usual = max(self._steps, default=None)
        limit = _FIRST_STALL if usual is None else max(_LEAST_STALL, _STALL_FACTOR * usual)
        if self._warned or now - self._last < limit:
            return None
        ranks = self._progress()  # of all ranks, so only when there is a stall
        if any(each.phase == EVALUATE for each in ranks):
            return None
        self._warned = True
        return stall_message(ranks, now - self._last, usual)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
