"""Train with every optimizer at ZeRO 0 to 2 on the ranks of a job, and resume; print a JSON line for each.

Not a test: tests start it on two ranks. A line has the losses before and after, whether a run that was saved and loaded
ends like one that was not (weights and average), how far the weights are from those of stage 0, and the bytes of the
state per parameter.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sgm.distributed
from sgm.training.optim.average import evaluation_weights, full_ema
from sgm.training.optim.optimizer import discard_initial_update, group_values, make_optimizer
from sgm.training.optim.schedule import LearningRate, lr_factor
from sgm.training.save import gather_parameters
from sgm.training.state import checkpoint_engine
from sgm.training.step import start_deepspeed

WIDTH, STEPS, CASES = 96, 6, json.loads(Path(sys.argv[1]).read_text())
Weights = dict[str, Tensor]


class Network(nn.Module):
    """Matrices of which one crosses the border of two slices."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=bias), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=bias))
        self.last = nn.Linear(WIDTH, 64, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return (self.last(self.layers(x)) - x[:, :64].flip(1)).square().mean()


def start(case: dict[str, Any], stage: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(bias=case.get("bias", True))
    network.to(torch.bfloat16 if case.get("bf16") else torch.float32)
    zero = {"stage": stage, **case.get("zero", {})}
    optimizer = make_optimizer(case["optimizer"], network.named_parameters(), ema_decay=0.5, zero=zero)
    schedule = LearningRate(optimizer, partial(lr_factor, train_iters=STEPS, decay_style="constant", warmup=2))
    initial = group_values(optimizer)
    section = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bool(case.get("bf16"))},
    }
    engine = start_deepspeed(network, optimizer, schedule, section)
    discard_initial_update(engine, initial)
    engine.checkpoint_engine = checkpoint_engine()
    return engine


def batch(number: int) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))


def train(engine: Any, steps: range) -> None:
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        engine.backward(engine(batch(2 * step + dist.get_rank()).to(dtype)))
        engine.step()


@torch.no_grad()
def loss(engine: Any) -> float:
    dtype = next(engine.module.parameters()).dtype
    with evaluation_weights(engine):
        return sum(float(engine.module(batch(number).to(dtype))) for number in range(2 * STEPS))


def weights(engine: Any) -> Weights:
    with evaluation_weights(engine):
        found = gather_parameters(engine, [name for name, _ in engine.module.named_parameters()])
    averages = full_ema(engine, engine.module.named_parameters())
    return found | {f"{name} (average)": value for name, value in averages.items()}


def state_bytes(engine: Any) -> int:
    """Return the bytes of the state of all ranks, without the average."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [optimizer.state, *(inner.state for inner in getattr(optimizer, "_inner", ()))]
    total = 0
    for state in states:
        for values in state.values():
            tensors = [value for name, value in values.items() if name != "ema" and isinstance(value, Tensor)]
            for tensor in tensors:
                names = getattr(tensor, "tensor_attrs", None)
                parts = [tensor] if names is None else [getattr(tensor, name) for name in names]
                total += sum(part.numel() * part.element_size() for part in parts)
    count = torch.tensor([float(total)])
    dist.all_reduce(count)
    return int(count)


def run(case: dict[str, Any], stage: int, folder: Path, reference: Weights) -> tuple[dict[str, Any], Weights]:
    straight = start(case, stage)
    before = loss(straight)
    train(straight, range(STEPS // 2))
    straight.save_checkpoint(str(folder), tag="half", save_latest=False)
    weights(straight)  # as a save does
    train(straight, range(STEPS // 2, STEPS))
    after, ends = loss(straight), weights(straight)
    resumed = start(case, stage)
    resumed.load_checkpoint(str(folder), tag="half")
    resumed.lr_scheduler.load_state_dict(resumed.lr_scheduler.state_dict())
    train(resumed, range(STEPS // 2, STEPS))
    again = weights(resumed)
    far = max((float((ends[name].float() - reference[name].float()).abs().max()) for name in reference), default=0.0)
    moved = max(float((value.float() - again[name].float()).abs().max()) for name, value in ends.items()) if ends else 0
    copies = dist.get_world_size() if stage == 0 else 1
    per_parameter = state_bytes(straight) / copies / sum(p.numel() for p in straight.module.parameters())
    line = {"before": before, "after": after, "resumed": moved, "from_stage_0": far, "bytes": per_parameter}
    straight.destroy()
    resumed.destroy()
    return line, ends


def main() -> None:
    """Run the cases of the file given on the command line."""
    sgm.distributed.initialize()
    sgm.distributed.prepare_deepspeed()
    for case in CASES:
        reference: Weights = {}
        for stage in case.get("stages", (0, 1, 2)):
            folder = Path(sys.argv[1]).parent / f"{case['name']}-{stage}"
            line, ends = run(case, stage, folder, reference)
            reference = reference or ends
            if dist.get_rank() == 0:
                sys.stdout.write(json.dumps({"name": case["name"], "stage": stage, **line}) + "\n")


if __name__ == "__main__":
    main()
