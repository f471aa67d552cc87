"""The ways of a training step take turns, and are what they say."""

import torch

from benchmarks import steps
from benchmarks.bench import Setup
from benchmarks.models import NetworkSize

TINY = NetworkSize(32, 2, 2, 16, latents=(2, 4, 4), text_length=3, text_hidden_size=8)
SIZES = steps.Sizes(TINY, 4, TINY)


def test_the_tables_have_a_row_a_way(capsys):
    assert steps.main(["--repeats", "1"], SIZES) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.endswith(" |")]
    assert [row[0] for row in rows] == [
        "| step",
        "| weights frozen",
        "| and LoRA of rank 4",
        "| step",
        "| nothing recomputed",
        "| all blocks recomputed",
        "| all without their attention",
    ]
    assert [row[-1] for row in rows if row[0] in ("| weights frozen", "| nothing recomputed")] == ["1.00 |"] * 2


def test_ways_of_recomputation_have_the_same_gradients_and_adapters_alone_are_trained():
    plain, *others = [step() for step in steps.recomputed_steps(SIZES).values()]
    for found in others:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    frozen, adapters = [step() for step in steps.adapter_steps(SIZES).values()]
    assert len(frozen) == 1 and len(adapters) == 1 + 2 * 2 * 4  # of each block: three pairs for q, k, v, and one
    assert frozen[0].abs().max() > 0


def test_ratios_are_those_of_a_turn(monkeypatch):
    seconds = iter([1.0, 2.0, 10.0, 30.0, 1.0, 2.5])
    monkeypatch.setattr(Setup, "seconds", lambda *_: next(seconds))
    setup = Setup(torch.device("cpu"), torch.float32, repeats=3)
    found = list(steps.rows({"a": lambda: None, "b": lambda: None}, setup))
    assert found == ["| a | 1.00 s | 1.00 |", "| b | 2.50 s | 2.50 |"]
