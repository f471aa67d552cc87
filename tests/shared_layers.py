"""Tensor parallel networks against one rank, for tests/shared_ranks.py: outputs, gradients, training steps, files."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sgm.distributed
from sgm.distributed import Mesh
from sgm.util import instantiate_from_config
from sgm.weights.checkpoint import load_network, save_network, write_latest
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.lazy import compute
from sgm.weights.partition import Shard, join_shards, partition_of, take_shard, unsharded_shape
from tests.test_dit_golden import FAMILIES, GOLDEN, load, network_config

STEPS, RATE = 3, 1e-4
FOUR_HEADS = "four heads"  # the golden networks have two heads, too few for Ulysses on 2×2 ranks
FAMILY, LORA = FAMILIES[1], FAMILIES[-1]


def train(network, inputs) -> dict[str, dict[str, torch.Tensor]]:
    """Return outputs and gradients of a forward and backward pass, and the weights after a few SGD steps."""
    named = dict(network.named_parameters())
    found = {}
    for _ in range(STEPS):
        x, timesteps, context = inputs
        x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
        network.zero_grad()
        output = network(x, timesteps, context)
        output.square().sum().backward()
        gradients = {name: summed(p.grad) for name, p in named.items() if p.grad is not None}
        inward = torch.cat([x.grad.flatten(), context.grad.flatten()])
        found = found or {"output": {"": output.detach()}, "input gradient": {"": inward}, "gradients": gradients}
        with torch.no_grad():
            for name, gradient in gradients.items():
                named[name] -= RATE * gradient
    return found | {"weights": {name: named[name].detach().clone() for name in found["gradients"]}}


def summed(gradient: torch.Tensor) -> torch.Tensor:
    """All-reduce a gradient over the sequence parallel ranks, as DeepSpeed does."""
    gradient = gradient.clone()
    if sgm.distributed.sequence_group() is not None:
        dist.all_reduce(gradient, group=sgm.distributed.sequence_group())
    return gradient


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join the shards of all ranks; replicated tensors must be identical."""
    whole = {}
    for name, tensor in tensors.items():
        parts = [torch.empty_like(tensor) for _ in range(sgm.distributed.tensor_parallel_size())]
        dist.all_gather(parts, tensor.contiguous(), group=sgm.distributed.tensor_group())
        if partition_of(name) is None:
            assert all(torch.equal(tensor, part) for part in parts), f"ranks differ in {name}"
        whole[name] = join_shards(name, parts)
    return whole


def built(family: str) -> dict[str, torch.Tensor]:
    """Return the initial parameters of a network, and random numbers drawn after them."""
    torch.manual_seed(7)
    network = instantiate_from_config(network_config(GOLDEN / family))
    return {name: p.detach() for name, p in network.named_parameters()} | {"next draw": torch.rand(3)}


def with_four_heads() -> torch.nn.Module:
    """Return a network with a control and random weights, or this rank's shard of it."""
    config = network_config(GOLDEN / FAMILY)
    config.params.num_attention_heads = 4
    config.params.control_channels = config.params.out_channels
    for section in config.params.modules.values():
        if "hidden_size_head" in (section.get("params") or {}):
            section.params.hidden_size_head = config.params.hidden_size // 4
    network = instantiate_from_config(config)
    draws = torch.Generator().manual_seed(1)
    for name, p in network.named_parameters():
        whole = torch.randn(unsharded_shape(name, p.shape, network.tensor_shard.size), generator=draws)
        p.data.copy_(take_shard(name, whole / whole.shape[-1] ** 0.5, network.tensor_shard))
    return network.train()


def of_four_heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the inputs of `with_four_heads`; the control is the latents backwards."""
    x, timesteps, context = load(GOLDEN / FAMILY)[1]
    return torch.cat((x, x[:, :, :16].flip(1)), dim=2), timesteps, context


def alone() -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Return the single-rank results by case, divided among the ranks; called before the mesh is initialized."""
    found = {}
    for case in (*FAMILIES, FOUR_HEADS)[dist.get_rank() :: dist.get_world_size()]:
        if case == FOUR_HEADS:
            found[case] = train(with_four_heads(), of_four_heads())
        else:
            network, inputs, io = load(GOLDEN / case)
            found[case] = train(network.train(), inputs) | {"built": built(case), "output": {"": io["output"]}}
    return {case: result for each in sgm.distributed.all_gather_objects(found) for case, result in each.items()}


def largest(own: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference; for tensors that are nearly zero, relative to the largest tensor."""
    assert own.keys() == expected.keys()
    floor = 1e-3 * max(float(tensor.norm()) for tensor in expected.values())
    return max(
        float((own[name] - tensor).norm()) / max(float(tensor.norm()), floor) for name, tensor in expected.items()
    )


def compare(case: str, ring: bool, recomputed: int, expected) -> dict[str, float]:
    network: Any
    if case == FOUR_HEADS:
        network, inputs = with_four_heads(), of_four_heads()
    else:
        network, inputs, _ = load(GOLDEN / case)
    network.ring_attention = ring
    network.get_mixin("adaln_layer").recomputed_layers = recomputed
    found = train(network.train(), inputs)
    return {
        "output": float((found["output"][""] - expected["output"][""]).abs().max()),
        "input gradient": largest(found["input gradient"], expected["input gradient"]),
        "weight gradient": largest(joined(found["gradients"]), expected["gradients"]),
        "weights": largest(joined(found["weights"]), expected["weights"]),
    }


def check(mesh: Mesh, expected) -> dict[str, dict[str, float]]:
    """Return the differences of every case."""
    name = f"layers {mesh.tensor}×{mesh.sequence}"
    if mesh.sequence == 1:
        found = {f"{name} {family}": compare(family, False, 0, expected[family]) for family in FAMILIES}
        found[f"{name} {LORA} recomputed"] = compare(LORA, False, 2, expected[LORA])
    else:
        found = {f"{name} {family} ring": compare(family, True, 2, expected[family]) for family in FAMILIES}
        found[f"{name} {FOUR_HEADS} Ulysses"] = compare(FOUR_HEADS, False, 2, expected[FOUR_HEADS])
    for family in FAMILIES:
        own = joined(built(family))
        assert all(torch.equal(own[name], value) for name, value in expected[family]["built"].items()), family
    check_files(mesh, LORA)
    return found


def check_files(mesh: Mesh, family: str) -> None:
    """Save shards and load them again; LoRA missing from a file is initialized as on one rank."""
    network, _, _ = load(GOLDEN / family)
    assert network.tensor_shard == Shard(dist.get_rank() % mesh.tensor, mesh.tensor)
    for name, parameter in network.named_parameters():
        assert parameter.model_parallel == (partition_of(name) is not None), name
    folder = Path(sgm.distributed.broadcast_from_rank_zero(tempfile.mkdtemp()))
    if dist.get_rank() < mesh.tensor:
        patch_size, shard = network.patch_size, network.tensor_shard
        save_network(folder, 5, network, patch_size=patch_size, shard=shard, latest=False)
    sgm.distributed.barrier()
    if dist.get_rank() == 0:
        write_latest(folder, 5)
    sgm.distributed.barrier()
    whole, shards = (read_tensors(find_weights(place)) for place in (GOLDEN / family / "transformer", folder))
    for name, tensor in shards.items():
        assert name not in whole or torch.equal(compute(tensor), whole[name]), name
    again = instantiate_from_config(network_config(GOLDEN / family))
    load_network(again, folder)
    for (name, one), (_, other) in zip(network.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
