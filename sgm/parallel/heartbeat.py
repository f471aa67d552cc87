"""Which ranks are still there: lets a rank that waits for a lost one name it, and end.

A collective whose partner died waits, or fails with an address at best. So every rank writes a sign of life into the
store of the job (which the launcher holds, or rank zero) and reads those of all others, whatever its main thread does.
A rank is lost when it says that it failed, or when its signs stop: for a short while where something else points to a
loss (a collective failed, SIGTERM came, another rank has lost one), for a long while otherwise.
"""

import atexit
import os
import platform
import select
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] (documented)

from sgm.util import RunError

# What a rank says: it works; it is done; its work failed; it ends because it has lost another one.
_WORKS, _DONE, _FAILED, _LOST_ONE = "works", "done", "failed", "lost-one"
_DOUBT_TICKS = 5  # signs that must be missing before a rank is lost, where there is a reason to doubt
_MAX_SILENCE_S, _MAX_DOUBT_S, _MAX_GRACE_S = 120.0, 10.0, 5.0
_CURE = "its own message says why; start the same command again (training goes on with args.resume=auto)"


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Peers:
    """Signs of life of this rank, and those of the others.

    Args:
        rank: of this process.
        size: number of ranks.
        timeout: within which a rank ends that has lost another.

    Raises:
        RunError: a rank does not show within `timeout`.
    """

    def __init__(self, *, rank: int, size: int, timeout: timedelta) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._rank, self._address = rank, f"{host}:{port}"
        self._holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        # All of it is over after 0.8 of the timeout: the groups' own one does not come first.
        seconds = timeout.total_seconds()
        self._tick = min(seconds / 4, _MAX_DOUBT_S) / _DOUBT_TICKS
        self._max_quiet = round(min(seconds / 2, _MAX_SILENCE_S) / self._tick)
        self._grace = min(seconds / 4, _MAX_GRACE_S)
        # A connection of its own: the one of the groups is locked while somebody waits for a key.
        store = TCPStore(host, port, wait_for_workers=False, timeout=timeout)
        # After a restart, the launcher may still have the signs of those before.
        self._store = PrefixStore(f"peers/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self._keys = [str(each) for each in range(size)]
        self._state, self._count = _WORKS, 0
        self._say()
        try:
            self._store.wait(self._keys)
        except dist.DistError as error:
            missing = [key for key in self._keys if not self._store.check([key])]
            raise RunError(f"no sign of rank {', '.join(missing)} after {seconds:g} s; {_CURE}") from error
        self._signs = self._read()
        self._answers, self._store_failed = 0, False
        self._doubt = 0  # ticks for which there is a reason to
        self._lost = ""
        self._found, self._changed, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._is_ending, self._is_told = False, False
        self._listen_to_signals()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._watch)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def _listen_to_signals(self) -> None:
        """Let SIGTERM reach the watching thread: the main thread may wait for a lost rank, and not see it."""
        self._waker, self._wake_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        self._handles_signals = threading.current_thread() is threading.main_thread()
        if self._handles_signals:
            self._former_fd = signal.set_wakeup_fd(self._wake_fd, warn_on_full_buffer=False)
            self._former = signal.getsignal(signal.SIGTERM)
            if self._former == signal.SIG_DFL:  # which would end the process before it can say why
                signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, *_: object) -> None:
        if not self._is_ending:  # the launcher's SIGTERM may come while the failed collective is being explained
            raise _Terminated

    # What the two threads do

    def _say(self) -> None:
        self._count += 1
        words = [self._state, str(os.getpid()), platform.node(), str(self._count)]
        self._store.set(str(self._rank), " ".join(words))

    def _read(self) -> list[list[str]]:
        return [value.decode().split(" ") for value in self._store.multi_get(self._keys)]

    def _talk(self) -> None:
        """Give signs, and read those of the others, until this rank has nothing more to say."""
        try:
            while True:
                state = self._state
                self._say()
                self._signs = self._read()
                self._answers += 1
                if state != _WORKS and not (state == _DONE and self._holds_store and self._others_work()):
                    return
                self._changed.wait(self._tick / 2)
                self._changed.clear()
        except RuntimeError:
            self._store_failed = True

    def _others_work(self) -> bool:
        return any(sign[0] == _WORKS for rank, sign in enumerate(self._signs) if rank != self._rank)

    def _watch(self) -> None:
        """Count for how many ticks each rank has been quiet; end this process where the main thread cannot."""
        quiet, quiet_store = [0] * len(self._keys), 0
        before, answers = self._signs, self._answers
        # Ticks, not times: a process that was stopped for a while does not take all others for lost.
        while not self._closed.is_set():
            if select.select([self._waker], [], [], self._tick)[0]:
                if signal.SIGTERM in os.read(self._waker, 64):
                    self._doubt = 2 * _DOUBT_TICKS
                continue
            signs = self._signs
            if self._answers != answers:
                quiet = [0 if new != old else num + 1 for new, old, num in zip(signs, before, quiet, strict=True)]
                quiet_store, before, answers = 0, signs, self._answers
            else:
                quiet_store += 1
            self._doubt = max(self._doubt - 1, 0)
            self._lost = self._name_lost(quiet, quiet_store)
            if self._lost:
                break
            if self._store_failed:
                return  # rank zero was done, and took the store along
        else:
            return
        self._found.set()
        self._change(_LOST_ONE)
        # Time for the main thread to say what it was doing, and to end. It may hang in a collective, for ever.
        if self._closed.wait(self._grace):
            time.sleep(self._grace)
        elif not self._is_told:
            sys.stderr.write(f"error: {self._lost}\n")
            sys.stderr.flush()
        os._exit(1)

    def _name_lost(self, quiet: list[int], quiet_store: int) -> str:
        """Return what is lost, and what to do; empty if nothing is."""
        others = [(rank, *sign[:3]) for rank, sign in enumerate(self._signs) if rank != self._rank]
        if any(state == _LOST_ONE for _, state, _, _ in others):
            self._doubt = max(self._doubt, 1)
        limit = _DOUBT_TICKS if self._doubt else self._max_quiet
        for wanted, reason in ((_FAILED, "ended before its work was done"), (_WORKS, ""), (_LOST_ONE, "")):
            for rank, state, process, host in others:
                if state == wanted and (reason or quiet[rank] >= limit):
                    reason = reason or f"is gone: no sign of life for {quiet[rank] * self._tick:.0f} s"
                    return f"rank {rank} (process {process} on {host}) {reason}; {_CURE}"
        if (self._store_failed or quiet_store >= limit) and (self._rank == 0 or self._signs[0][0] != _DONE):
            _, process, host, _ = self._signs[0]
            owner = "the launcher" if self._rank == 0 else f"rank 0 (process {process} on {host}), or its launcher,"
            return f"{owner} is gone: {self._address} does not answer; {_CURE}"
        return ""

    def _change(self, state: str) -> None:
        if self._state == _WORKS:
            self._state = state
            self._changed.set()

    # What the main thread calls

    def explain(self, error: BaseException) -> NoReturn:
        """Raise `error`, or a RunError that names the lost rank from which it follows.

        The other ranks learn that this one failed, where it did so on its own.
        """
        self._is_ending = True
        if _may_follow_from_a_loss(error):
            self._doubt = 2 * _DOUBT_TICKS
            self._found.wait(2 * _DOUBT_TICKS * self._tick)
            if self._lost:
                self._is_told = True
                raise RunError("\n".join(filter(None, [str(error), self._lost]))) from error
        self._change(_FAILED)
        raise error

    def close(self) -> None:
        """Say that this rank is done, unless it failed, and stop watching.

        The rank that holds the store stays until the others are done.
        """
        if self._closed.is_set():
            return
        atexit.unregister(self.close)
        self._change(_DONE)
        self._threads[0].join(None if self._holds_store and not self._lost else 2 * self._tick)
        self._closed.set()
        if self._handles_signals:
            signal.set_wakeup_fd(self._former_fd)
            if self._former == signal.SIG_DFL:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not self._lost:
            os.write(self._wake_fd, b"\0")
            self._threads[1].join()
            os.close(self._waker)
            os.close(self._wake_fd)


def _may_follow_from_a_loss(error: BaseException | None) -> bool:
    """Whether a collective may have raised `error`, or SIGTERM, which launchers send when a rank is lost."""
    while error is not None:
        if type(error) is RuntimeError or isinstance(error, dist.DistError | _Terminated):
            return True
        error = error.__cause__
    return False
