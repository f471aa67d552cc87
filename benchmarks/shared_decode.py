"""Time context parallel decoding, one thread per rank, against one rank with one thread.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 -m benchmarks.shared_decode

One rank and all ranks decode alternately in the same processes; the fastest of each counts. Prints seconds, their ratio
and the largest difference of the videos.
"""

import argparse
import sys
import time

import torch

import sgm.distributed
from benchmarks.models import build_vae, vae_section


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", nargs=3, type=int, default=(13, 6, 8), metavar=("T", "H", "W"))
    parser.add_argument("--channels", type=int, default=128, help="of the first level; the released VAE has 128")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = sgm.distributed.world_size()
    sgm.distributed.initialize(mesh=sgm.distributed.Mesh(context=size))
    vae = build_vae(vae_section("cogvideox_5b", ch=options.channels))
    latents = torch.randn(1, 16, *options.latents, generator=torch.Generator().manual_seed(0))
    seconds: dict[int, float] = {}
    videos = {}
    with torch.no_grad():
        for _ in range(options.turns + 1):  # the first one warms up
            for cp_size in (1, size):
                vae.cp_size = cp_size
                sgm.distributed.barrier()
                start = time.perf_counter()
                if cp_size > 1 or sgm.distributed.rank() == 0:
                    videos[cp_size] = vae.decode(latents)
                sgm.distributed.barrier()
                seconds[cp_size] = min(seconds.get(cp_size, float("inf")), time.perf_counter() - start)
    if sgm.distributed.rank() == 0:
        difference = float((videos[1] - videos[size]).abs().max())
        sys.stdout.write(
            f"1 rank {seconds[1]:.3f} s, {size} ranks {seconds[size]:.3f} s: {seconds[1] / seconds[size]:.2f}x "
            f"(largest difference {difference:.1e})\n"
        )
    sgm.distributed.shutdown()


if __name__ == "__main__":
    main()
