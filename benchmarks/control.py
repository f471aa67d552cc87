"""What a rank does at the start and beside a run of a thousand ranks, of which the others are simulated.

    python -m benchmarks.control
    python -m benchmarks.control --ranks 8 1024

Groups are created and plans compared with torch's fake process group, which counts as many ranks as it is told. The
store is a real one of torch in this process: heartbeats of all ranks go through it one after the other, as often as in
a second of a run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] (documented)

import sgm.distributed
from sgm.distributed import Mesh
from sgm.parallel.heartbeat import watched_by

ROOT = Path(__file__).parents[1]
MESH = Mesh(sequence=8, context=8)
COLLECTIVES = (
    "new_group",
    "broadcast",
    "all_reduce",
    "all_gather",
    "barrier",
    "broadcast_object_list",
    "all_gather_object",
)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Context that counts the calls of torch's collectives, and of the creation of groups."""
    calls: dict[str, int] = {}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    before = {name: getattr(dist, name) for name in COLLECTIVES}
    for name, function in before.items():
        setattr(dist, name, counting(name, function))
    try:
        yield calls
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def start(ranks: int, mesh: Mesh) -> dict[str, Any]:
    """Create the groups of rank zero of `ranks`, and compare its plan; return seconds and calls of both."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from sgm.training.prepare import agree

    found: dict[str, Any] = {}
    os.environ["WORLD_SIZE"] = str(ranks)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    data = SimpleNamespace(digest="d" * 64, captions_digest="c" * 64)
    plan = SimpleNamespace(config=SimpleNamespace(digest="c" * 64), data=data, mesh=mesh, resume=None)
    works = {"groups": lambda: sgm.distributed.initialize(mesh=mesh), "plans": lambda: _agree(agree, plan)}
    for name, work in works.items():
        with counted() as calls:
            begun = time.perf_counter()
            work()
            found[name] = {"seconds": time.perf_counter() - begun, "calls": dict(calls)}
    return found


def _agree(agree: Callable[[Any], Any], plan: Any) -> None:
    try:
        agree(plan)
    except TypeError as error:  # a plan that agrees is copied, and this one is no dataclass
        assert "dataclass" in str(error)


def beats(ranks: int) -> dict[str, float]:
    """Return the seconds in which a store serves one heartbeat of all ranks, and the keys that a rank reads for it."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    client = TCPStore("localhost", server.port, wait_for_workers=False, timeout=timedelta(seconds=60))
    for rank in range(ranks):
        client.set(str(rank), "works 1 machine 1")
    begun = time.perf_counter()
    for rank in range(ranks):
        client.set(str(rank), "works 1 machine 2")
        client.multi_get([str(each) for each in watched_by(rank, ranks)])
        client.check(["reason"])
    return {"seconds": time.perf_counter() - begun, "keys": len(watched_by(1, ranks))}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 1024])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a process for each number
    options = parser.parse_args(argv)
    if options.one:
        sys.stdout.write(json.dumps(start(options.ranks[0], MESH)))
        return 0
    print("| ranks | groups, s | calls of new_group | plans, s | collectives | a heartbeat of all, s | keys read |")
    print("|" + "---|" * 7)
    for ranks in options.ranks:
        words = [sys.executable, "-m", "benchmarks.control", "--one", "--ranks", str(ranks)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(done.stderr[-2000:])
            return 1
        found, heard = json.loads(done.stdout.splitlines()[-1]), beats(ranks)
        groups, plans = found["groups"], found["plans"]
        made = groups["calls"].get("new_group", 0)
        print(
            f"| {ranks} | {groups['seconds']:.2f} | {made} | {plans['seconds']:.2f} | "
            f"{sum(plans['calls'].values())} | {heard['seconds']:.2f} | {heard['keys']} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
