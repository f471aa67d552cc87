"""Pairs of ranks without a launcher, one of which fails, is killed, stopped or stuck; for test_heartbeat.py.

Run: python tests/sgm/parallel/failing_ranks.py RESULTS.json

All pairs run at the same time. Writes {case: {"codes": ..., "pids": ..., "messages": ...}}, a list of two each.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch.distributed as dist

import sgm.distributed as d
from sgm.config.args import SamplingArgs
from sgm.data.cache import Description
from sgm.parallel.heartbeat import Peers
from sgm.training.inputs.precompute import Job, run_jobs
from sgm.training.prepare import agree
from tests.processes import rank_environments
from tests.sgm.training.points import POINT

TIMEOUT = 8  # seconds; the machine may be busy, and heartbeats late
LONG = 3 * TIMEOUT  # that of ranks that pause or end apart: half of it, less a pause, is what heartbeats may be late
NEVER = timedelta(minutes=5)  # timeout of waits that only heartbeats end, and of heartbeats that must not, however late
FORKS = multiprocessing.get_context("fork")  # fork after all imports


def fail_on_rank_one() -> None:
    assert d.rank() == 0 or 1 / 0
    time.sleep(300)


def be_stuck_on_rank_one() -> None:
    d.report_progress(3, "data" if d.rank() == 1 else "network")
    time.sleep(300 * d.rank())
    d.barrier()


def wait_in_the_store() -> None:
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(NEVER)
    store.get("never set" if d.rank() == 0 else "nor this")


def wait_in_a_collective(waiting: int) -> None:
    """Let one rank wait for the other one, in a collective with a long timeout."""
    group = next(group for group in dist.distributed_c10d._world.pg_map if timeout_of(group) == NEVER)
    dist.barrier(group) if d.rank() == waiting else time.sleep(300)


def end_apart() -> None:
    time.sleep(0.6 * LONG * d.rank())  # a rank that works is lost after half of it


def pause_apart() -> None:
    time.sleep(TIMEOUT)


def never_meet() -> None:
    time.sleep(300)


def outlast_a_collective() -> None:
    assert d.run_on_rank_zero(lambda: time.sleep(1.5 * TIMEOUT) or d.rank()) == 0


def disagree() -> None:
    """Each rank has found another state to resume from, and other captions."""
    text = str(d.rank())
    data = type("Clips", (), {"digest": "a", "captions_digest": text, "__str__": lambda _: "clips"})()
    point = dataclasses.replace(POINT, run=Path("run"), iteration=d.rank())
    agree(SimpleNamespace(config=SimpleNamespace(digest="c"), data=data, mesh=d.Mesh(), resume=point))  # pyright: ignore


def meet_late() -> None:
    """A rank may encode for longer than the timeout of collectives."""
    time.sleep(1.5 * TIMEOUT * d.rank())
    d.wait_for_all()
    assert d.all_gather_objects(d.rank()) == [0, 1]


def encode_different_clips() -> None:
    """Rank 1 sees a clip less, and would write its clips into the shards of rank zero."""
    keys = ("data/a.mp4, 5 bytes", "data/b.mp4, 6 bytes")[: 2 - d.rank()]
    description = Description("latents", "fp16", {"precision": "fp32"}, tuple((key,) for key in keys))
    run_jobs([Job(description, 1, lambda: 1 / 0)], Path("never made"))  # pyright: ignore


# Work of both ranks, and signals sent to them: (seconds after the previous one, rank, signal).
Signals = list[tuple[float, int, signal.Signals]]
CASES: dict[str, tuple[Callable[[], Any], Signals]] = {
    "killed": (never_meet, [(0, 1, signal.SIGKILL)]),
    "killed, then SIGTERM": (never_meet, [(0, 1, signal.SIGKILL), (0.1, 0, signal.SIGTERM)]),
    "killed while the other is in a collective": (partial(wait_in_a_collective, 0), [(0.5, 1, signal.SIGKILL)]),
    "killed while the other waits in the store": (wait_in_the_store, [(0.5, 1, signal.SIGKILL)]),
    "stopped with the store": (partial(wait_in_a_collective, 1), [(0.5, 0, signal.SIGSTOP)]),
    "stopped without the store": (partial(wait_in_a_collective, 0), [(0.5, 1, signal.SIGSTOP)]),
    "failed": (fail_on_rank_one, []),
    "stuck": (be_stuck_on_rank_one, []),
    "slow": (outlast_a_collective, []),
    "late": (meet_late, []),
    "different": (disagree, []),
    "different clips": (encode_different_clips, []),
    "apart": (end_apart, []),
    "paused": (pause_apart, [(0, 1, signal.SIGSTOP), (LONG / 8, 1, signal.SIGCONT)]),
}


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(d.device()).options._timeout


def be_rank(env: dict[str, str], work: Callable[[], Any], path: Path) -> None:
    """Run the work of a rank as the commands do; write messages to a file."""
    os.environ.update(env)
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)
    timeout = LONG if work in (pause_apart, end_apart) else TIMEOUT
    if work in (outlast_a_collective, meet_late):  # of interest is the timeout of collectives
        d.Peers = lambda rank, size, timeout: Peers(rank=rank, size=size, timeout=NEVER)
    d.configure(SamplingArgs(distributed_timeout=timeout))
    d.initialize(mesh=d.Mesh(sequence=2))
    dist.new_group([0, 1])
    groups = list(dist.distributed_c10d._world.pg_map)
    assert len(groups) > 3 and {timeout_of(group) for group in groups} == {timedelta(seconds=timeout)}
    dist.new_group([0, 1], timeout=NEVER)
    path.with_suffix(".ready").touch()
    try:
        with d.explain_lost_ranks():
            work()
    except Exception as error:
        sys.exit(f"error: {error}")
    finally:
        d.shutdown()


class Pair:
    """Two ranks with a rendezvous at rank zero."""

    def __init__(self, folder: Path, work: Callable[[], Any], signals: Signals) -> None:
        self.paths, self.signals = [folder / f"{rank}.txt" for rank in range(2)], list(signals)
        envs = rank_environments(2)
        self.ranks = [
            FORKS.Process(target=be_rank, args=(*each,)) for each in zip(envs, (work, work), self.paths, strict=True)
        ]
        for rank in self.ranks:
            rank.start()
        self.next_at: float | None = None  # when the next signal is due

    def poll(self) -> bool:
        """Send the signals that are due; return whether both ranks have ended."""
        now = time.monotonic()
        if self.next_at is None and all(path.with_suffix(".ready").exists() for path in self.paths):
            self.next_at = now + (self.signals[0][0] if self.signals else 0)
        while self.next_at is not None and self.signals and now >= self.next_at:
            _, number, what = self.signals.pop(0)
            os.kill(self.ranks[number].pid, what)
            self.next_at += self.signals[0][0] if self.signals else 0
        return all(rank.exitcode is not None or self.stays_stopped(rank.pid) for rank in self.ranks)

    def stays_stopped(self, pid: int) -> bool:
        return not self.signals and psutil.Process(pid).status() == psutil.STATUS_STOPPED

    def result(self) -> dict[str, Any]:
        for rank in self.ranks:
            rank.kill()
            rank.join()
        return {
            "codes": [rank.exitcode for rank in self.ranks],
            "pids": [rank.pid for rank in self.ranks],
            "messages": [path.read_text() for path in self.paths],
        }


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pairs = {}
        for case, (work, signals) in CASES.items():
            place = Path(folder, case)
            place.mkdir()
            pairs[case] = Pair(place, work, signals)
        end = time.monotonic() + 100
        while not all([pair.poll() for pair in pairs.values()]) and time.monotonic() < end:
            time.sleep(0.02)
        Path(path).write_text(json.dumps({case: pair.result() for case, pair in pairs.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
