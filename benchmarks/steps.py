"""Time training steps of a small network: adapters beside frozen weights, and blocks that are recomputed.

    python -m benchmarks.steps
    python -m benchmarks.steps --only LoRA --repeats 9 --cpu-time

Forward and backward pass, without optimizer. The ways of a table take turns, and figures are medians of their ratios
to the first way of the same turn, so that other load on the machine affects all of them.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.bench import Setup, environment
from benchmarks.models import NetworkSize, build_network, network_section

Steps = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks, of which latents are the (T, H, W) that they train on.

    Attributes:
        adapters: of the network with adapters: wide, since their part of the work falls with the width.
        rank: of the adapters.
        recomputed: of the network whose blocks are recomputed: long clips, where attention weighs most.
    """

    adapters: NetworkSize
    rank: int
    recomputed: NetworkSize


# A block of the 5B; and tokens of which attention takes 0.45 of a block's products, as 0.49 of the 5B's at 49×480×720.
CPU = Sizes(
    NetworkSize(3072, 48, 1, 512, latents=(5, 16, 24), text_length=226, text_hidden_size=4096),
    128,
    NetworkSize(512, 8, 2, 512, latents=(6, 32, 48), text_length=226, text_hidden_size=1024),
)


def step_of(network: Any, size: NetworkSize) -> Callable[[], object]:
    """Return a function that runs forward and backward pass, also to the latents, as through further blocks."""
    generator = torch.Generator().manual_seed(0)
    frames, height, width = size.latents
    x = torch.randn(1, frames, network.in_channels, height, width, generator=generator).requires_grad_()
    context = torch.randn(1, size.text_length, size.text_hidden_size, generator=generator)
    trained = [x, *(parameter for parameter in network.parameters() if parameter.requires_grad)]

    def step() -> object:
        loss = network(x, torch.tensor([500]), context).square().mean()
        return torch.autograd.grad(loss, trained, allow_unused=True)

    return step


def adapter_steps(sizes: Sizes) -> Steps:
    """Return the steps of a network with frozen weights, and of the same with adapters that are trained."""
    found = {}
    for name in ("weights frozen", f"and LoRA of rank {sizes.rank}"):
        section = network_section("cogvideox_5b", sizes.adapters)
        if found:
            section["params"]["modules"]["lora_config"] = {
                "target": "sat.model.finetune.lora2.LoraMixin",
                "params": {"r": sizes.rank},
            }
        network = build_network(section).train()
        for parameter_name, parameter in network.named_parameters():
            parameter.requires_grad_("matrix_" in parameter_name)
        found[name] = step_of(network, sizes.adapters)
    return found


def recomputed_steps(sizes: Sizes) -> Steps:
    """Return the steps of a network of which nothing is recomputed, all blocks, and all without their attention."""
    found = {}
    for name in ("nothing recomputed", "all blocks recomputed", "all without their attention"):
        section = network_section("cogvideox_5b", sizes.recomputed)
        section["params"]["transformer_args"]["checkpoint_activations"] = bool(found)
        network = build_network(section).train()
        if len(found) == 2:
            network.keep_attention()
        found[name] = step_of(network, sizes.recomputed)
    return found


TABLES: Mapping[str, Callable[[Sizes], Steps]] = {"LoRA": adapter_steps, "recomputation": recomputed_steps}


def rows(steps: Steps, setup: Setup) -> Iterator[str]:
    """Yield the rows of a table: median seconds, and median ratio to the first way; the first calls do not count."""
    for step in steps.values():
        step()
    turns = [{name: setup.seconds(step) for name, step in steps.items()} for _ in range(setup.repeats)]
    first = next(iter(steps))
    for name in steps:
        ratio = statistics.median(turn[name] / turn[first] for turn in turns)
        yield f"| {name} | {statistics.median(turn[name] for turn in turns):.2f} s | {ratio:.2f} |"


def main(argv: Sequence[str] | None = None, sizes: Sizes = CPU) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(TABLES), help="one of the tables")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, on a busy CPU")
    words = parser.parse_args(argv)
    if words.repeats < 1:
        parser.error(f"--repeats={words.repeats}: give 1 or more")
    setup = Setup(torch.device("cpu"), torch.float32, words.repeats, words.cpu_time)
    print(", ".join(f"{name} {value}" for name, value in environment(setup).items()))
    for name, make in TABLES.items():
        if words.only in (None, name):
            print("| step | time | to the first |\n|---|---|---|", flush=True)
            for row in rows(make(sizes), setup):
                print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
