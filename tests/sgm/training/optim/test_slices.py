"""The step in slices: as large ones, bit by bit, in less memory."""

import pytest
import torch
from torch import nn

import sgm.distributed
from sgm.checks.estimate import STEPS_AT_ONCE
from sgm.checks.meta_run import LiveBytes
from sgm.training.optim import slices
from sgm.training.optim.optimizer import KINDS, make_optimizer, steps_in_slices
from sgm.training.step import start_deepspeed

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
CASES = {
    "AdamW": ADAMW,
    "SGD": {"type": "torch.optim.SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "schedule-free": {"type": "schedulefree.AdamWScheduleFree", "params": {"lr": 1e-2}},
    "8 bits": {"type": "torchao.optim.AdamW8bit", "params": {"lr": 1e-2}},
    "Muon": {"type": "Muon", "params": {"lr": 1e-2}},
}


def start(section, *, width=40, depth=3):
    sgm.distributed.initialize()
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).bfloat16()
    zero = {"stage": 2}
    optimizer = make_optimizer(section, network.named_parameters(), ema_decay=0.5, zero=zero)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    return start_deepspeed(network, optimizer, None, config)


def backward(engine, seed):
    x = torch.randn(4, engine.module[0].in_features, generator=torch.Generator().manual_seed(seed))
    engine.backward(engine(x.bfloat16()).square().mean())


def tensors(value):
    """Yield all tensors and numbers in a state."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, torch.Tensor | int | float):
        yield torch.as_tensor(value)


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_slices_is_a_step(name, monkeypatch):
    """Weights, averages, moments and counters, with gradients that are clipped; and a state goes on."""
    if CASES[name]["type"].startswith("torchao"):
        pytest.importorskip("torchao.optim", reason="torchao is not installed: pip install .[lowmem]")
    states = []
    for numbers in (2**20, 64):
        monkeypatch.setattr(slices, "NUMBERS", numbers)
        engine = start(CASES[name])
        for seed in range(3):
            backward(engine, seed)
            engine.step()
        states.append([*engine.module.parameters(), *tensors(engine.optimizer.state_dict())])
    assert len(states[0]) == len(states[1]) > 12
    for whole, sliced in zip(*states, strict=True):
        assert whole.dtype == sliced.dtype and torch.equal(whole, sliced)


@pytest.mark.parametrize("section", [ADAMW, CASES["Muon"]], ids=["vector", "matrices"])
def test_only_a_slice_of_the_gradients_is_in_float32(section, monkeypatch):
    monkeypatch.setattr(slices, "NUMBERS", 2**12)
    engine = start(section, width=64, depth=32)
    for seed in range(2):  # the first step makes the state
        backward(engine, seed)
        with LiveBytes() as live:
            engine.step()
    # Beside a slice, or a matrix and Muon's orthogonalization of it, norms of single gradients and averages of slices.
    assert 4 * 2**12 < live.peak < 12 * 4 * 2**12 < 4 * 32 * 64**2


def test_the_estimate_knows_who_steps_at_once():
    assert all(f"{root}.".startswith(STEPS_AT_ONCE) for root, kind in KINDS.items() if kind.sums)
    weight = nn.Parameter(torch.zeros(2))
    prodigy = make_optimizer({"type": "prodigyopt.Prodigy", "params": {}}, [("weight", weight)])
    assert not steps_in_slices(prodigy) and steps_in_slices(make_optimizer(ADAMW, [("weight", weight)]))
    blocks = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "bitsandbytes.optim.adamw"})
    assert not steps_in_slices(blocks([weight])), "its statistics are of blocks, which a slice would number anew"


def test_gradients_that_cross_tensors_and_end_in_padding():
    parts, scaled = [torch.arange(6.0).view(2, 3), torch.full((2,), 7.0)], []
    gradients = slices._Gradients(parts, torch.zeros(10), lambda given, norm: scaled.append(norm))
    gradients.norm = 3
    assert gradients.of(slice(4, 10)).tolist() == [4, 5, 7, 7, 0, 0]
    assert gradients.of(slice(0, 2)).tolist() == [0, 1] and gradients.of(slice(8, 10)).tolist() == [0, 0]
    assert scaled == [3, 3, 3]
