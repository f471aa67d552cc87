"""What ranks found by themselves is compared before training; failing_ranks.py has real ones that differ."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

import sgm.distributed
from benchmarks.control import PlanOfNothing
from sgm.distributed import Mesh
from sgm.training.prepare import agree


@pytest.fixture
def plan():
    return PlanOfNothing(SimpleNamespace(digest="a" * 64), SimpleNamespace(digest="b", captions_digest="c"), Mesh())


def test_ranks_that_agree_send_as_much_however_many_they_are(plan, monkeypatch):
    def gather(_):
        raise AssertionError("each of a thousand ranks would get a thousand answers")

    monkeypatch.setattr(sgm.distributed, "all_gather_objects", gather)
    assert agree(plan) == plan


def test_all_answers_are_gathered_if_another_rank_differs(plan, monkeypatch):
    """This rank has what rank zero has; the all-reduce says that not all do."""
    gathered = []
    monkeypatch.setattr(sgm.distributed, "all_reduce_", lambda tensor, largest: tensor.fill_(1))
    monkeypatch.setattr(
        sgm.distributed,
        "all_gather_objects",
        lambda own: gathered.append(own) or [own, own, {**own, "the sizes of its parallel groups": "others"}],
    )
    with pytest.raises(sgm.distributed.InputError, match="rank 2 has the sizes of its parallel groups others"):
        agree(plan)
    assert len(gathered) == 1 and replace(plan) == plan
