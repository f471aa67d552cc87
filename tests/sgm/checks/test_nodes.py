"""The check of the machines of a run: faulty ranks, injected, are named."""

import dataclasses
import errno
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sgm.checks import nodes
from sgm.checks.nodes import Report, judge, listing_digest, partner
from tests.processes import run

TOY = ("configs/toy_lora.yaml", "configs/toy_sft.yaml")
SPEEDS = {"matmul": 400.0, "neighbours": 40.0, "all-reduce": 30.0, "all-to-all": 20.0}


def ranks(num: int = 4, **faults) -> list[Report]:
    """Return the reports of ranks on two machines, the third of them with `faults`."""
    found = [
        Report(f"node{rank // 2}", {"torch": "2.13.0", "the clips": "ab"}, 100.0, speeds=SPEEDS) for rank in range(num)
    ]
    found[2] = dataclasses.replace(found[2], **faults)
    return found


def test_ranks_that_are_alike_pass():
    table, broken = judge(ranks())
    assert broken == [] and "slow" not in table
    assert table.splitlines()[0].split()[:2] == ["rank", "machine"] and len(table.splitlines()) == 5


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"alike": {"torch": "2.9.0", "the clips": "ab"}}, "torch is 2.9.0, and 2.13.0 on 3 of 4 ranks"),
        ({"alike": {"torch": "2.13.0"}}, "the clips is missing, and ab on 3 of 4 ranks"),
        ({"clock": 160.0}, "its clock is +60.0 s off"),
        ({"unseen": ["args.save (ckpts)"]}, "args.save (ckpts) is not the folder that rank 0 sees"),
        ({"reduced": False}, "an all-reduce gives a wrong sum there"),
        ({"wrong_senders": [0, 1]}, "it gets wrong values in an all-to-all, from ranks [0, 1]"),
    ],
)
def test_a_broken_rank_is_named(faults, said):
    _, (line,) = judge(ranks(**faults))
    assert line.startswith("  rank 2 on node1: ") and said in line


def test_a_rank_that_sends_wrong_values_is_named_not_those_that_get_them():
    found = [dataclasses.replace(report, wrong_senders=[3]) for report in ranks()]
    _, (line,) = judge(found)
    assert line.startswith("  rank 3 on node1: what it sends in an all-to-all arrives wrong at 4 ranks")


@pytest.mark.parametrize("name", ["matmul", "neighbours"])
def test_a_slow_rank_is_named_and_does_not_stop_the_run(name):
    table, broken = judge(ranks(speeds=SPEEDS | {name: SPEEDS[name] / 2}))
    assert broken == [] and f"slow: rank 2 on node1: {name} {SPEEDS[name] / 2:.3g}" in table
    assert table.count("(slow)") == 1


@pytest.mark.parametrize("off", [8.0, -8.0, 100.0])
def test_of_two_machines_the_clock_that_is_off_from_that_of_rank_zero_is_named(off):
    found = [dataclasses.replace(report, clock=100.0 + off * (report.host == "node1")) for report in ranks()]
    _, broken = judge(found)
    assert [line.split(":")[0] for line in broken] == ["  rank 2 on node1", "  rank 3 on node1"]
    assert all(f"its clock is {off:+.1f} s off" in line for line in broken)


def exchanges(size: int, local: int, speed) -> list[float]:
    """Return the best speed of each rank with its partners, of `speed` (rank, rank)."""
    found = [[partner(rank, size, local, turn) for turn in range(3)] for rank in range(size)]
    for turn in range(3):
        pairs = {rank: others[turn] for rank, others in enumerate(found) if others[turn] is not None}
        assert all(pairs[other] == rank != other for rank, other in pairs.items())
    return [max(speed(rank, other) for other in others if other is not None) for rank, others in enumerate(found)]


@pytest.mark.parametrize(("size", "local"), [(16, 8), (24, 8), (40, 8), (32, 4), (8, 8), (2, 1), (7, 4)])
def test_ranks_are_compared_over_like_links(size, local):
    whole = size % local == 0 and size > local
    speeds = exchanges(size, local, lambda a, b: 400.0 if a // local == b // local else 40.0)
    assert set(speeds) == {40.0} if whole else min(speeds) >= 40.0


@pytest.mark.parametrize(
    ("size", "local", "slow"), [(3, 1, [1]), (4, 1, [3]), (24, 8, [*range(8)]), (32, 8, [9]), (5, 5, [0])]
)
def test_a_slow_link_is_that_of_the_rank_or_machine_behind_it(size, local, slow):
    speeds = exchanges(size, local, lambda a, b: 10.0 if {a, b} & {*slow} else 40.0)
    found = [Report(f"node{rank // local}", {}, speeds={"neighbours": speed}) for rank, speed in enumerate(speeds)]
    lines = [line for line in judge(found)[0].splitlines() if line.startswith("slow: ")]
    assert [int(line.split()[2]) for line in lines] == slow


def test_collectives_are_as_slow_on_all_ranks():
    assert "slow" not in judge(ranks(speeds=SPEEDS | {"all-reduce": 1.0}))[0]


def test_a_listing_changes_with_names_and_sizes(tmp_path):
    (tmp_path / "a").write_text("1")
    before = listing_digest(tmp_path)
    (tmp_path / "a").write_text("12")
    assert len({before, listing_digest(tmp_path), listing_digest(tmp_path / "a")}) >= 2
    assert listing_digest(tmp_path) != before


def test_a_folder_that_others_do_not_see(tmp_path, monkeypatch):
    assert nodes._is_shared(tmp_path / "runs" / "new") and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(nodes.sgm.distributed, "broadcast_from_rank_zero", lambda value: ("another", value[1]))
    assert not nodes._is_shared(tmp_path) and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_no_folder_that_others_do_not_see(tmp_path, monkeypatch):
    def write(path: Path, text: str, **_: str) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write)
    assert nodes._is_shared(tmp_path) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_ranks_of_this_machine(tmp_path):
    done = run("train_video.py", ["--base", *TOY, f"args.save={tmp_path / 'runs'}", "--check"], 2)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("rank  machine") :].splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["0", "1"] and not (tmp_path / "runs").exists()


def test_faults_of_a_real_rank_are_named(tmp_path):
    done = run("tests/sgm/checks/faulty_ranks.py", [str(tmp_path)], 2)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "the machines of this run do not fit together:"
    broken = [line for line in lines if line.startswith("  rank ")]
    assert len(broken) == 2 and all(line.startswith("  rank 1 on ") for line in broken)
    assert "the clips is ab, and cd on 1 of 2 ranks" in broken[0]
    assert re.search(r"its clock is \+(59|6[01])\.\d s off", broken[1])
    assert any(line.startswith("slow: rank 1 on ") and ": matmul " in line for line in lines)
    assert not any(line.startswith("slow: rank 0 on ") and ": matmul " in line for line in lines)


def test_versions_of_what_computes_and_sends_are_compared(monkeypatch):
    assert {"Python", "torch", "deepspeed", "SwissArmyTransformer", "transformers"} <= nodes._versions().keys()
    monkeypatch.setattr(nodes, "_PACKAGES", ("no-such-package",))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    module = SimpleNamespace(nccl=SimpleNamespace(version=lambda: (2, 29, 3)))
    monkeypatch.setattr(torch, "get_device_module", lambda: module)
    found = nodes._versions()
    del found["Python"]
    assert found == {"no-such-package": "missing", "CUDA": "13.0", "NCCL": "2.29.3"}
