"""A script for several ranks, no test: they share samples in the network and the VAE, and compare with one rank."""

import json
import sys

import torch.distributed as dist

import sgm.distributed
from sgm.distributed import Mesh
from tests import shared_layers, shared_tokens
from tests.vae_modules import shared_clips


def shared_sample(size: int) -> dict[str, dict[str, float]]:
    """Share the tokens of a sample, and the frames of a clip."""
    sgm.distributed.initialize(mesh=Mesh(context=size, sequence=size))
    assert sgm.distributed.context_parallel_size() == size == dist.get_world_size(sgm.distributed.sequence_group())
    assert sgm.distributed.data_parallel_size() == dist.get_world_size() // size
    return shared_tokens.check(size) | shared_clips.check(size)


def shared_network(size: int) -> dict[str, dict[str, float]]:
    """Share layers among two ranks, and tokens among what is left."""
    # A process has one mesh in its life. Not here: to start processes takes longer than what they are tested for.
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
