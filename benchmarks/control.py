"""What a rank does at the start and beside a run of a thousand ranks, of which the others are simulated.

    python -m benchmarks.control
    python -m benchmarks.control --ranks 8 1024

Groups are created and plans compared with torch's fake process group, which counts as many ranks as it is told. The
store is a real one of torch in this process: heartbeats of all ranks go through it one after the other, as often as in
a second of a run. Reports of nodes, phases of a step and files of a resume state are made up, one for each rank; what
judges and divides them is what a run calls.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] (documented)

import sgm.distributed
from sgm.checks.nodes import UNITS, Report, judge
from sgm.config.load import load_config
from sgm.distributed import Mesh
from sgm.parallel.heartbeat import watched_by
from sgm.training.repartition import Layout, SavedState
from sgm.training.timing import PHASES, slow_ranks
from sgm.util import instantiate_from_config, without_allocating
from sgm.weights.partition import Shard

ROOT = Path(__file__).parents[1]
BAR_S = 30  # of what happens once, at the start or at a resume
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


@dataclass(frozen=True)
class PlanOfNothing:
    """What `sgm.training.prepare.agree` compares of a plan."""

    config: Any
    data: Any
    mesh: Mesh
    resume: None = None


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
    plan: Any = PlanOfNothing(SimpleNamespace(digest="c" * 64), data, mesh)
    works = {"groups": lambda: sgm.distributed.initialize(mesh=mesh), "plans": lambda: agree(plan)}
    for name, work in works.items():
        with counted() as calls:
            begun = time.perf_counter()
            work()
            found[name] = {"seconds": time.perf_counter() - begun, "calls": dict(calls)}
    return found


def nodes(ranks: int) -> float:
    """Return the seconds in which rank zero judges the reports of all ranks, of which one is slow."""
    alike = {f"version {number}": "1" for number in range(15)}
    reports = [Report(f"node{rank // 8}", alike, speeds=dict.fromkeys(UNITS, 40.0)) for rank in range(ranks)]
    reports[-1] = Report("slow", alike, speeds=dict.fromkeys(UNITS, 4.0))
    begun = time.perf_counter()
    table, broken = judge(reports)
    seconds = time.perf_counter() - begun
    assert not broken and f"slow: rank {ranks - 1} on slow: matmul" in table
    return seconds


def phases(ranks: int) -> float:
    """Return the seconds in which rank zero looks for a slow rank in a line of metrics."""
    even = dict.fromkeys(PHASES, 1.0)
    begun = time.perf_counter()
    (found,) = slow_ranks([even] * (ranks - 1) + [{**even, "data": 9.0}], 10.0)
    assert found[:2] == (ranks - 1, "data")
    return time.perf_counter() - begun


def state(ranks: int, stage: int) -> dict[str, float]:
    """Return the seconds in which a rank divides the state of a 2B on twice as many ranks, and the files it reads."""
    config = load_config([ROOT / "configs" / f"{name}.yaml" for name in ("cogvideox_2b", "sft")],
                         ["args.train_data=[clips]"], mode="train")  # fmt: skip
    with without_allocating():
        network = instantiate_from_config(config.model["network_config"])
    shapes = [
        {name: p.shape for name, p in network.named_parameters() if (p.dim() > 1) is many} for many in (True, False)
    ]
    saved, layout = (Layout(stage, world, Shard(), tuple(shapes)) for world in (2 * ranks, ranks))
    vectors = [torch.zeros(1).expand(length) for length in saved.lengths]
    weights, base = ("fp32_flat_groups", "optimizer_state_dict") if stage == 3 else (
        "single_partition_of_fp32_groups", "base_optimizer_state")  # fmt: skip
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": v, "exp_avg_sq": v} for i, v in enumerate(vectors)}
    groups = [{"params": [i]} for i in range(len(vectors))]
    count = 2 * ranks if stage == 3 else [2 * ranks] * len(vectors)
    own = {weights: vectors, base: {"state": moments, "param_groups": groups}, "partition_count": count}
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2 * ranks)]
    read: list[str] = []

    def content(path: Path) -> Any:
        read.append(path.name)
        return {"optimizer_state_dict": own, "param_shapes": shapes}

    begun = time.perf_counter()
    SavedState(Path(), names, stage=stage, size=1, read=content).partition(layout, ranks // 2)
    return {"seconds": time.perf_counter() - begun, "files": len([name for name in read if "optim" in name])}


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
    print(f"Each of what happens once is to take {BAR_S} s at most.\n")
    print("| ranks | groups, s | calls of new_group | plans, s | collectives | a heartbeat of all, s | keys read | "
          "nodes, s | metrics, s | state of ZeRO 2, s | files | of ZeRO 3, s | files |")  # fmt: skip
    print("|" + "---|" * 13)
    for ranks in options.ranks:
        words = [sys.executable, "-m", "benchmarks.control", "--one", "--ranks", str(ranks)]
        alone = {name: value for name, value in os.environ.items() if name != "LOCAL_WORLD_SIZE"}  # `state` sets it
        done = subprocess.run(words, cwd=ROOT, env=alone, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(done.stderr[-2000:])
            return 1
        found, heard = json.loads(done.stdout.splitlines()[-1]), beats(ranks)
        groups, plans = found["groups"], found["plans"]
        made, divided = groups["calls"].get("new_group", 0), [state(ranks, stage) for stage in (2, 3)]
        print(
            f"| {ranks} | {groups['seconds']:.2f} | {made} | {plans['seconds']:.2f} | "
            f"{sum(plans['calls'].values())} | {heard['seconds']:.2f} | {heard['keys']} | {nodes(ranks):.2f} | "
            f"{phases(ranks):.3f} | "
            + " | ".join(f"{each['seconds']:.2f} | {each['files']}" for each in divided)
            + " |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
