"""Run under torchrun: ranks share samples in the network and in the VAE, and compare with one rank. Not a test."""

import json
import sys

import torch.distributed as dist

import sgm.distributed
from tests import shared_tokens
from tests.vae_modules import shared_clips


def main() -> None:
    """Print the largest difference over all ranks, by case."""
    size = int(sys.argv[1])
    sgm.distributed.initialize(mesh=sgm.distributed.Mesh(context=size, sequence=size))
    assert sgm.distributed.context_parallel_size() == size == dist.get_world_size(sgm.distributed.sequence_group())
    assert sgm.distributed.data_parallel_size() == dist.get_world_size() // size
    found = shared_tokens.check(size) | shared_clips.check(size)
    worst: dict[str, float] = {}
    for result in sgm.distributed.from_all_ranks(found):
        for case, values in result.items():
            worst |= {f"{case}: {name}": max(value, worst.get(f"{case}: {name}", 0)) for name, value in values.items()}
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(worst) + "\n")
    sgm.distributed.shutdown()


if __name__ == "__main__":
    main()
