"""Script for several ranks: parallel network and VAE; prints differences from one rank."""

import json
import sys

import torch
import torch.distributed as dist

import sgm.distributed
from sgm.distributed import Mesh
from sgm.models.video_diffusion import TrainingInputs
from tests import shared_layers, shared_tokens
from tests.vae_modules import shared_clips


def shared_sample(size: int) -> dict[str, dict[str, float]]:
    """Sequence parallel network, context parallel VAE."""
    sgm.distributed.initialize(mesh=Mesh(context=size, sequence=size))
    assert sgm.distributed.context_parallel_size() == size == dist.get_world_size(sgm.distributed.sequence_group())
    assert sgm.distributed.data_parallel_size() == dist.get_world_size() // size
    check_broadcast()
    return shared_tokens.check(size) | shared_clips.check(size)


def check_broadcast() -> None:
    """Nested values are broadcast with their tensors, of any dtype and layout."""
    inputs = TrainingInputs(torch.ones(2, 3).T, {"crossattn": torch.ones(0).half()}, torch.arange(2), torch.ones(()))
    received = sgm.distributed.broadcast_in_sample_group(
        {"path": ["a.mp4", None], "inputs": (inputs, 1)} if sgm.distributed.sample_rank() == 0 else None
    )
    assert received["path"] == ["a.mp4", None] and received["inputs"][1] == 1
    for name, expected in vars(inputs).items():
        torch.testing.assert_close(getattr(received["inputs"][0], name), expected, rtol=0, atol=0)


def shared_network(size: int) -> dict[str, dict[str, float]]:
    """Tensor parallel over two ranks, sequence parallel over the rest."""
    # A process normally keeps its mesh; replaced here, since new processes would take longer than the test.
    sgm.distributed._mesh = None
    sgm.distributed._sample_groups.clear()
    sgm.distributed._axes.clear()
    sgm.distributed.initialize()
    alone = shared_layers.alone()
    mesh = Mesh(tensor=2, sequence=size // 2)
    sgm.distributed.initialize(mesh=mesh)
    return shared_layers.check(mesh, alone)


def main() -> None:
    """Print the largest difference over all ranks, by case."""
    size = int(sys.argv[1])
    found = shared_sample(size)
    if size % 2 == 0:
        found |= shared_network(size)
    worst: dict[str, float] = {}
    for result in sgm.distributed.all_gather_objects(found):
        for case, values in result.items():
            worst |= {f"{case}: {name}": max(value, worst.get(f"{case}: {name}", 0)) for name, value in values.items()}
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(worst) + "\n")
    sgm.distributed.shutdown()


if __name__ == "__main__":
    main()
