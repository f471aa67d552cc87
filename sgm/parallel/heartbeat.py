"""Heartbeats: when a rank is lost, the others report it and exit.

A background thread of every rank writes heartbeats into the job's store (held by the launcher or rank zero) and reads
those of its neighbours and of rank zero: if each of a thousand ranks read all, the store would give out a million a
second. The first rank that fails, or finds another one lost, records the reason in the store; the others report it and
exit with code 1. The heartbeats of all are read to name a rank that is stuck, or to say what each is doing.

Why not torchrun and the timeout of collectives alone: a rank that waits outside a collective would never end if its
launcher was killed or does not exist; a lost machine would be noticed only after the full timeout; and errors of gloo
and NCCL do not name the rank.
"""

import atexit
import contextlib
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple, NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] (documented)

from sgm.cli import Terminated, raise_terminated
from sgm.util import RunError

_WORKS, _WAITS, _DONE = "works", "waits", "done"  # states of a rank; waits: a collective failed
_NEIGHBOURS = 4  # on each side, whose heartbeats a rank reads
_SUSPECT_TICKS = 5  # allowed missed heartbeats after a failed collective
_CURE = "start the same command again (training goes on with args.resume=auto)"


def watched_by(rank: int, size: int) -> list[int]:
    """Return the ranks whose heartbeats `rank` of `size` ranks reads: its neighbours, itself and rank zero."""
    near = {(rank + step) % size for step in range(-_NEIGHBOURS, _NEIGHBOURS + 1)}
    return sorted(near | {0})


class Progress(NamedTuple):
    """What a rank is doing.

    Attributes:
        name: of the rank, with process and machine.
        iteration: of training.
        phase: of that iteration.
        seconds: since the phase began.
    """

    name: str
    iteration: int
    phase: str
    seconds: float


class Peers:
    """Send heartbeats of this rank and check those of the others.

    Args:
        rank: of this process.
        size: number of ranks.
        timeout: of collectives. A rank is lost after min(timeout / 2, 120 s) without heartbeats, or
            min(timeout / 4, 10 s) after a failed collective or SIGTERM; then the main thread has
            min(timeout / 4, 5 s) to exit.

    Attributes:
        found: is set when a rank is lost; the main thread then has a while to exit.

    Raises:
        DistError: a rank sends no heartbeat within `timeout`.
    """

    def __init__(self, *, rank: int, size: int, timeout: timedelta) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        seconds = timeout.total_seconds()
        self._rank, self._size, self._address = rank, size, f"{host}:{port}"
        self._watched = watched_by(rank, size)
        self._holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._tick, self._grace = min(seconds / 4, 10) / _SUSPECT_TICKS, min(seconds / 4, 5)
        self._max_missed = round(min(seconds / 2, 120) / self._tick)
        # A separate connection: that of the groups is locked while it waits for a key. A separate prefix: torchrun
        # keeps old heartbeats when it restarts the ranks.
        store = TCPStore(host, port, wait_for_workers=False, timeout=timeout)
        self._store = PrefixStore(f"heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self._state, self._count, self._reason, self._lost = _WORKS, 0, "", ""
        self._doing: tuple[int, str, float] | None = None  # iteration, phase, and since when
        self._send()
        self._beats: dict[int, list[str]] = {}  # those that were read last, by rank
        self._fresh: tuple[int, ...] = ()  # the ranks whose heartbeats were read last
        self._receive(self._watched)
        self._num_received = 0
        self._store_failed = False
        self._changed, self.found, self._closed = threading.Event(), threading.Event(), threading.Event()
        is_main = threading.current_thread() is threading.main_thread()
        self._handles_sigterm = is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if self._handles_sigterm:  # launchers send it when a rank is lost: name that rank before exiting
            signal.signal(signal.SIGTERM, raise_terminated)
        self._exchanging = threading.Thread(target=self._exchange, daemon=True)
        self._exchanging.start()
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.close)

    def _send(self) -> None:
        self._count += 1
        doing = ""
        if self._doing is not None:
            iteration, phase, since = self._doing
            doing = f" {iteration} {phase} {time.monotonic() - since:.1f}"
        self._store.set(str(self._rank), f"{self._state} {os.getpid()} {platform.node()} {self._count}{doing}")

    def report_progress(self, iteration: int, phase: str) -> None:
        """Send with the next heartbeats that this rank is in a phase of an iteration."""
        self._doing = iteration, phase, time.monotonic()

    def progress(self) -> list[Progress]:
        """Return what all ranks are doing, by their last heartbeats, without those that do not say."""
        self._receive_all()
        return [
            Progress(self._name(rank), int(beat[4]), beat[5], float(beat[6]))
            for rank, beat in sorted(self._beats.items())
            if len(beat) > 4
        ]

    def _receive(self, ranks: Iterable[int]) -> None:
        """Read the heartbeats of some ranks."""
        ranks = list(ranks)
        values = self._store.multi_get([str(rank) for rank in ranks])
        found = {rank: value.decode().split(" ") for rank, value in zip(ranks, values, strict=True)}
        self._beats, self._fresh = {**self._beats, **found}, tuple(ranks)

    def _receive_all(self) -> None:
        """Read the heartbeats of all ranks, as far as the store answers."""
        with contextlib.suppress(RuntimeError):
            self._receive(range(self._size))

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self._beats[rank][1]} on {self._beats[rank][2]})"

    def _where(self, rank: int) -> str:
        beat = self._beats[rank]
        return f", {float(beat[6]):.0f} s in {beat[5]} of iteration {beat[4]}," if len(beat) > 4 else ""

    def _others(self, *states: str) -> list[int]:
        return [rank for rank, beat in sorted(self._beats.items()) if rank != self._rank and beat[0] in states]

    def _exchange(self) -> None:
        """Thread: exchange heartbeats until this rank is done or a reason to exit is recorded."""
        try:
            while True:
                state = self._state
                waits_for_all = state == _DONE and self._holds_store
                self._send()
                # After a failure, the rank that caused it may be any; and the store stays until all are done.
                self._receive(range(self._size) if waits_for_all or state == _WAITS else self._watched)
                is_last = state == _DONE and not (waits_for_all and self._others(_WORKS, _WAITS))
                if self._reason:
                    self._store.compare_set("reason", "", self._reason)
                elif self._store.check(["reason"]):
                    self._lost = self._store.get("reason").decode()
                self._num_received += 1
                if is_last or self._reason or self._lost:
                    break
                self._changed.wait(self._tick / 2)
                self._changed.clear()
            if self._holds_store and not is_last:
                time.sleep(self._tick)  # let the others read the reason
        except RuntimeError:
            self._store_failed = True

    def _watch(self) -> None:
        """Thread: count missed heartbeats; end the process if its main thread hangs."""
        missed, missed_answers, beats, num_received = {}, 0, self._beats, 0
        # Ticks, not wall time: a process that was suspended must not consider all others lost.
        while not self._lost:
            if self._closed.wait(self._tick) or self._reason:
                return
            if self._num_received == num_received:
                missed_answers += 1
            else:
                former, beats, num_received, missed_answers = beats, self._beats, self._num_received, 0
                fresh = self._fresh
                missed = {n: 0 if beats[n] != former.get(n) else missed.get(n, 0) + 1 for n in fresh if n in beats}
            if lost := self._find_lost(missed, missed_answers):
                self._lost = self._reason = self._lost or lost
                self._changed.set()
        self.found.set()
        if self._closed.wait(self._grace):
            time.sleep(self._grace)
        else:  # the main thread may hang in a collective forever
            sys.stderr.write(f"error: {self._lost}\n")
            sys.stderr.flush()
        os._exit(1)

    def _find_lost(self, missed: dict[int, int], missed_answers: int) -> str:
        """Return a message naming the lost rank or launcher; empty if none is lost."""
        for rank in self._others(_WORKS, _WAITS):
            if missed.get(rank, 0) >= self._max_missed:
                seconds = f"{missed[rank] * self._tick:.0f} s"
                return f"{self._name(rank)} is gone: no heartbeat for {seconds}; its own message says why; {_CURE}"
        store_is_lost = self._store_failed or missed_answers >= self._max_missed
        if store_is_lost and (self._rank == 0 or self._beats[0][0] != _DONE):
            owner = "the launcher" if self._rank == 0 else f"{self._name(0)}, or its launcher,"
            return f"{owner} is gone: {self._address} does not answer; {_CURE}"
        return ""

    def explain(self, error: BaseException) -> NoReturn:
        """Raise `error`, or a RunError naming the lost rank that caused it; record the reason for the others."""
        if signal.getsignal(signal.SIGTERM) == raise_terminated:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher, while the reason is looked for
        lost = ""
        if (cause := _collective_error(error)) is not None:
            self._state, self._max_missed = _WAITS, _SUSPECT_TICKS
            self.found.wait(2 * _SUSPECT_TICKS * self._tick)
            lost = self._lost
            if not lost and "timed out" in str(cause).lower():
                self._receive_all()
            if not lost and "timed out" in str(cause).lower() and (stuck := self._others(_WORKS)):
                names = ", ".join(self._name(rank) + self._where(rank) for rank in stuck)
                lost = f"{names} is stuck: it did not come to the collective that failed here; {_CURE}"
        reason = (str(error) or "no message").splitlines()[0]
        self._reason = lost or f"{self._name(self._rank)} failed: {type(error).__name__}: {reason}; {_CURE}"
        self._changed.set()
        if lost:
            raise RunError("\n".join(filter(None, [str(error), lost]))) from error
        raise error

    def close(self) -> None:
        """Send the last heartbeat and stop; the rank that hosts the store waits until the others are done."""
        if self._closed.is_set():
            return
        atexit.unregister(self.close)
        self._state = _DONE
        self._changed.set()
        self._exchanging.join(None if self._holds_store else 2 * self._tick)
        self._closed.set()
        if self._handles_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _collective_error(error: BaseException | None) -> BaseException | None:
    """Return the collective's error, or SIGTERM, from the causes of `error`."""
    while error is not None and type(error) is not RuntimeError and not isinstance(error, dist.DistError | Terminated):
        error = error.__cause__
    return error
