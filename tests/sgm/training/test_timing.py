import re
import time

import pytest
import torch

import sgm.distributed
from sgm.parallel.heartbeat import Progress
from sgm.training import timing
from sgm.training.timing import PHASES, PhaseClock, StallWatch, slow_ranks, stall_message
from tests.processes import train_all


def test_a_phase_interrupts_the_one_around_it(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    clock = PhaseClock(torch.device("cpu"))
    clock.iteration = 7
    with clock("communication"):  # starts at 1
        with clock("data"):  # 2 to 3
            assert sgm.distributed.progress_of_ranks()[0][1:3] == (7, "data")
    with clock(timing.EVALUATE):  # 5 to 6
        pass
    with pytest.raises(ValueError), clock("save"):  # 7 to 8
        raise ValueError
    assert clock.seconds() == dict.fromkeys(PHASES, 0.0) | {"communication": 2.0, "data": 1.0, "save": 1.0}
    assert clock.seconds() == dict.fromkeys(PHASES, 0.0)


EVEN = {"data": 0.1, "encode": 1.0, "network": 8.0, "communication": 0.1, "save": 0.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({2: {"data": 6.0}}, [(2, "data", "rank 2 spends 6 s of a step of 10 s in data, the median is 0.1 s")]),
        ({1: {"save": 5.0}}, [(1, "save", "rank 1 spends 5 s")]),
        (
            {rank: {"communication": 4.0} for rank in (0, 2, 3)},
            [(1, "network", "rank 1 computes slower: the others wait 4 s of a step of 10 s for it")],
        ),
        (
            {0: {"data": 5.0}} | {rank: {"communication": 5.0} for rank in (1, 2, 3)},
            [(0, "data", "rank 0 spends 5 s")],
        ),
        ({0: {"communication": 5.0}, 1: {"data": 5.0}}, [(1, "data", "rank 1 spends 5 s")]),  # of two
        (
            {rank: {"data": 4.0} for rank in range(4)},
            [(None, "data", "data takes 4 s of a step of 10 s: raise args.num")],
        ),
    ],
)
def test_the_rank_and_phase_that_make_steps_slow_are_named(changes, said):
    num_ranks = 2 if changes.keys() == {0, 1} else 4
    found = list(slow_ranks([EVEN | changes.get(rank, {}) for rank in range(num_ranks)], 10.0))
    assert [each[:2] for each in found] == [each[:2] for each in said]
    assert all(text.startswith(start) for (_, _, text), (_, _, start) in zip(found, said, strict=True))


# Of a group that shares a sample, the first rank reads and encodes, and the others wait for it.
FIRST, OTHER = EVEN | {"encode": 3.0, "communication": 0.5}, EVEN | {"data": 0.0, "encode": 0.0, "communication": 4.0}


@pytest.mark.parametrize("group", [2, 4])
def test_ranks_that_read_for_others_are_compared_with_each_other(group):
    ranks = [FIRST if rank % group == 0 else OTHER for rank in range(8)]
    assert list(slow_ranks(ranks, 10.0, group)) == []
    ranks[group] = FIRST | {"data": 6.0}
    assert [each[:2] for each in slow_ranks(ranks, 10.0, group)][0] == (group, "data")
    reads = [each | {"data": 5.0 * (each is FIRST)} for each in [FIRST, OTHER] * 4]
    assert [each[:2] for each in slow_ranks(reads, 10.0, 2)] == [(None, "data")]


@pytest.mark.parametrize(
    ("doing", "said"),
    [
        ([(5, "network"), (5, "data"), (5, "communication")], "rank 1 has been in data of iteration 5 for 70 s; the"),
        ([(5, "network"), (5, "network"), (5, "communication")], "rank 0, rank 1 have been in network of iteration 5"),
        ([(6, "data"), (5, "communication"), (6, "data")], "rank 1 has been in communication of iteration 5"),
        ([(5, "save")] * 3, "all 3 ranks have been in save of iteration 5 for 70 s"),
        ([(5, "data")], "rank 0 has been in data of iteration 5 for 70 s"),
    ],
)
def test_the_rank_that_holds_up_a_step_is_named(doing, said):
    message = stall_message([Progress(f"rank {i}", *each, seconds=70.0) for i, each in enumerate(doing)], 75.0, 4.0)
    assert message.startswith(f"no step has ended for 75 s (the last ones took up to 4 s): {said}")


def test_a_stall_is_told_once_and_again_after_the_next_step(monkeypatch):
    now, doing = [0.0], [Progress("rank 0", 1, "data", 9.0)]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(timing.threading, "Thread", lambda **_: type("Idle", (), {"start": lambda self: None})())
    watch = StallWatch(lambda: doing)
    assert watch.check(599.0) is None
    assert "for 601 s (the first one is not done)" in (watch.check(601.0) or "")
    now[0] = 602.0
    watch.start_again()
    for now[0] in (612.0, 618.0):
        watch.step_done()
    assert watch.check(717.0) is None, "below ten steps"
    assert "for 101 s (the last ones took up to 10 s)" in (watch.check(719.0) or "")
    assert watch.check(800.0) is None, "told once"
    watch.step_done()
    doing[0] = Progress("rank 0", 1, timing.EVALUATE, 9.0)
    assert watch.check(10_000.0) is None, "an evaluation takes its time"


@pytest.mark.slow  # two ranks, of which one is late on purpose
def test_a_real_rank_that_is_late_is_named_while_it_is_and_afterwards(training_yaml, tmp_path):
    overrides = [f"args.save={tmp_path / 'runs'}", "args.train_iters=6"]
    said = train_all(
        [{"bases": training_yaml("dit_t2v_5b_lora"), "overrides": overrides, "late": {"5": 20.0}}], tmp_path, world=2
    )
    stall = re.findall(r"no step has ended for \d+ s .*: (rank \d+) \(.*\) has been in (\w+) of iteration (\d+)", said)
    assert ("rank 1", "data", "5") in stall
    slow = re.findall(r"(rank \d+) spends .* in data, the median is .*: the others wait for it", said)
    assert slow == ["rank 1"], "once, by one rank"
