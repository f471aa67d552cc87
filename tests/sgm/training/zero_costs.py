"""Measure memory and traffic of DeepSpeed for the ZeRO sections in a JSON file; print a line for each.

Not a test: tests start it on several ranks. Every line is a JSON object: peak bytes of the tensors of rank zero, and
numbers sent by each collective in an iteration, both in multiples of the network's parameters.
"""

import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sgm.distributed
from sgm.checks.meta_run import LiveBytes
from sgm.training.optim.average import keep_average
from sgm.training.step import start_deepspeed

BLOCKS, DIM = 16, 128
COLLECTIVES = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
KEPT = []  # of earlier sections: tensors alive at the start of a measurement must not be freed during it


class Network(nn.Module):
    """Blocks of two matrices. The second half is frozen, so the backward pass goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 4 * DIM, bias=False), nn.ReLU(), nn.Linear(4 * DIM, DIM, bias=False))
            for _ in range(BLOCKS)
        )
        self.blocks[BLOCKS // 2 :].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def tensors() -> Iterator[Tensor]:
    """Yield the tensors of this process that have memory."""
    gc.collect()
    for value in gc.get_objects():
        if isinstance(value, Tensor):
            for tensor in (value, value.grad if value.is_leaf else None):
                if tensor is not None and tensor.device.type != "meta":
                    yield tensor


def count_traffic(sent: Counter) -> None:
    """Wrap the collectives of torch, so that each call adds the larger of its tensors to `sent`."""

    def wrapped(name: str, call: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            sent[name] += max(value.numel() for value in given)
            before, result = [value._use_count() for value in given], call(*args, **kwargs)
            # A thread of gloo lets go of the tensors a moment later, and until then they have memory.
            while result is None and [value._use_count() for value in given] > before:
                time.sleep(0.001)
            return result

        return counting

    for name in COLLECTIVES:
        setattr(dist, name, wrapped(name, getattr(dist, name)))


def measure(section: dict[str, Any], ema_decay: float | None, sent: Counter) -> dict[str, Any]:
    """Train for two iterations and measure the second."""
    live = LiveBytes()
    live.count(tensors())
    before = live.live
    torch.manual_seed(0)
    network = Network().bfloat16()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    if ema_decay is not None:
        keep_average(optimizer, ema_decay)
    engine = start_deepspeed(network, optimizer, None, section)
    KEPT.append(engine)
    for _ in range(2):
        sent.clear()
        live.count(tensors())
        live.peak = live.live
        with live:
            for _ in range(section["gradient_accumulation_steps"]):
                engine.backward(engine(torch.randn(2, DIM, dtype=torch.bfloat16)))
                engine.step()
    total = BLOCKS * 8 * DIM**2
    traffic = {name: sent[name] / total for name in COLLECTIVES}
    return {"memory": (live.peak - before) / total, "traffic": traffic}


def main() -> None:
    """Measure the sections of the file given on the command line."""
    sgm.distributed.initialize()
    sgm.distributed.prepare_deepspeed()
    sent = Counter()
    count_traffic(sent)
    gc.freeze()  # exclude imported objects from garbage collections
    for case in json.loads(Path(sys.argv[1]).read_text()):
        result = measure(case["section"], case["ema_decay"], sent)
        if dist.get_rank() == 0:
            sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
