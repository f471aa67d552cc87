"""Which process of several says what went wrong."""

import pytest

import sgm.distributed
from sgm import cli
from sgm.util import InputError, RunError


@pytest.mark.parametrize(
    ("rank", "local_rank", "began", "speaks"),
    [("0", "0", False, True), ("1", "1", False, False), ("8", "0", False, True), ("1", "1", True, True)],
)
def test_wrong_input_is_reported_once_per_machine_and_by_every_rank_after_the_start(
    monkeypatch, capsys, rank, local_rank, began, speaks
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(sgm.distributed, "has_mesh", lambda: began)
    assert cli._report(InputError("no such file"), debug=False, memory_hint="") == 2
    assert ("no such file" in capsys.readouterr().err) == speaks
    assert cli._report(RunError("the disk is full"), debug=False, memory_hint="") == 1
    assert "the disk is full" in capsys.readouterr().err
