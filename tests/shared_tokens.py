"""Sequence parallel golden networks against one rank, for tests/shared_ranks.py."""

import torch
import torch.distributed as dist

import sgm.distributed
from sgm.util import InputError
from tests.shared_layers import of_four_heads, with_four_heads
from tests.test_dit_golden import FAMILIES, GOLDEN, load


def run(network, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output, gradients of latents and text, and gradients of all weights."""
    x, timesteps, context = inputs
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    network.zero_grad()
    output = network(x, timesteps, context)
    output.square().sum().backward()
    weights = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return output.detach(), torch.cat([x.grad.flatten(), context.grad.flatten()]), torch.cat(weights)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def run_alone(network, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the results of `run` on one rank."""
    sequence_group = sgm.distributed.sequence_group
    sgm.distributed.sequence_group = lambda: None
    alone = run(network.train(), inputs)  # these networks have no dropout
    sgm.distributed.sequence_group = sequence_group
    return alone


def compare(network, inputs, ring: bool, alone, expected: torch.Tensor | None) -> dict[str, float]:
    """Return the differences from one rank, and of the output from `expected` if given."""
    network.ring_attention = ring
    network.get_mixin("adaln_layer").recomputed_layers = 0
    network.train()
    output, inward, weights = run(network, inputs)
    group = sgm.distributed.sequence_group()
    dist.all_reduce(weights, group=group)
    network.get_mixin("adaln_layer").recomputed_layers = 2
    recomputed = run(network, inputs)[2]
    if not ring:
        network.keep_attention()
        assert torch.equal(run(network, inputs)[2], recomputed), "kept attention is that of its recomputation"
        network.get_mixin("adaln_layer").keeps_attention = False
    dist.all_reduce(recomputed, group=group)
    return {
        "output": float((output - (alone[0] if expected is None else expected)).abs().max()),
        "input gradient": relative(inward, alone[1]),
        "weight gradient": relative(weights, alone[2]),
        "recomputed gradient": relative(recomputed, alone[2]),
    }


def check(size: int) -> dict[str, dict[str, float]]:
    """Return the differences of every case."""
    found = {}
    for family in FAMILIES:
        network, inputs, io = load(GOLDEN / family)
        alone = run_alone(network, inputs)
        heads = network.transformer.layers[0].attention.num_attention_heads
        for ring in (False, True) if heads >= size else (True,):
            name = f"DiT {family}, {'ring' if ring else 'Ulysses'}"
            found[name] = compare(network, inputs, ring, alone, io["output"])
    # The golden networks have two heads; on three ranks, these four are sharded unevenly.
    network, inputs = with_four_heads(), of_four_heads()
    alone = run_alone(network, inputs)
    found["DiT of four heads, Ulysses"] = compare(network, inputs, False, alone, None)
    network, (x, timesteps, context), _ = load(GOLDEN / FAMILIES[2])
    try:
        network(x, timesteps, context[:, :1])
    except InputError as error:
        assert "cannot be shared by" in str(error)
    else:
        raise AssertionError("a text too short for the ranks was accepted")
    return found
