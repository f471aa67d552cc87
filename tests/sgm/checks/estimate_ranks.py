"""Count traffic and memory of two ranks per sample; for test_estimate.py.

Run: torchrun --standalone --nproc_per_node=2 tests/sgm/checks/estimate_ranks.py

Rank zero writes {case: {"sent": bytes, "forward": peak bytes, "sent in training": bytes, "training": peak bytes}}.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo  # checkpoint does it; once there are groups, that would keep them, and their threads, to the end
import torch.distributed as dist

import sgm.distributed
from sgm.checks.meta_run import LiveBytes
from sgm.distributed import Mesh
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.util import instantiate_from_config
from tests.sgm.checks.live_bytes import BATCH, ProductsOfZeros, inputs, make_network, vae_section

LAYERS, REPEATS = 3, 2
sent = 0


def count_traffic() -> None:
    """Wrap the collectives to count the bytes this rank sends (ring all-gather and all-reduce)."""

    def add(numbers: float, tensor: torch.Tensor) -> None:
        global sent
        sent += int(numbers * tensor.element_size())

    def group_size(args: Any, kwargs: Any) -> int:
        groups = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, dist.ProcessGroup)]
        return dist.get_world_size(groups[0] if groups else None)

    def all_to_all(_: Any, x: torch.Tensor, received: Any, sizes: list[int], *, group: Any) -> None:
        add(x.numel() - sizes[dist.get_rank(group)], x)

    def all_gather(_: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        add(x.numel() * (group_size(args, kwargs) - 1), x)

    def all_reduce(x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        size = group_size(args, kwargs)
        add(2 * (size - 1) / size * x.numel(), x)

    def batch(operations: list[Any]) -> None:
        for operation in operations:
            if operation.op is dist.isend:
                add(operation.tensor.numel(), operation.tensor)

    def send(x: torch.Tensor, *_: Any, **__: Any) -> None:
        add(x.numel(), x)

    def wrapped(call: Callable, count: Callable) -> Callable:
        def counting(*args: Any, **kwargs: Any) -> Any:
            count(*args, **kwargs)
            return call(*args, **kwargs)

        return counting

    counters = {
        "all_to_all_single": all_to_all,
        "all_gather": all_gather,
        "all_reduce": all_reduce,
        "batch_isend_irecv": batch,
        "send": send,
    }
    for name, count in counters.items():
        setattr(dist, name, wrapped(getattr(dist, name), count))


def counted(work: Callable[[], Any]) -> int:
    global sent
    sent = 0
    work()
    return sent


def measure(network: Any) -> dict[str, float]:
    """Passes without gradients, then with, recomputed. The least peak of several: gloo's threads free buffers late."""
    forward, training = [], []
    for _ in range(REPEATS):
        with torch.no_grad(), LiveBytes() as live, ProductsOfZeros():
            sent = counted(lambda: network(*inputs()))
        forward.append(live.peak)
    network.get_mixin("adaln_layer").recomputed_layers = LAYERS
    for _ in range(REPEATS):
        with LiveBytes() as live, ProductsOfZeros():
            in_training = counted(lambda: network(*inputs()).float().square().mean().backward())
        training.append(live.peak)
        network.zero_grad(set_to_none=True)
    return {"sent": sent, "forward": min(forward), "sent in training": in_training, "training": min(training)}


def main() -> None:
    """Measure every axis, on two ranks."""
    from sat import mpu

    sgm.distributed.initialize(mesh=Mesh(sequence=2, context=2))
    count_traffic()
    found = {}
    for name, ring in (("Ulysses", False), ("ring", True)):
        network = make_network(layers=LAYERS)
        network.ring_attention = ring
        found[name] = measure(network)
    group = sgm.distributed.sequence_group()
    vae = instantiate_from_config(vae_section(cp_size=2))
    vae.decodes_everywhere = False
    with torch.no_grad():
        found["VAE"] = {"sent": counted(lambda: vae.decode(torch.randn(1, 16, 6, 4, 4)))}

    alone = replace(Mesh(), cfg=2)
    sgm.distributed._mesh, sgm.distributed._axes = alone, {"cfg": group}
    x, timesteps, context = inputs()
    x, timesteps, context = (torch.cat([one, one]) for one in (x, timesteps, context))
    assert len(x) == 2 * BATCH
    with torch.no_grad():
        wrapper = OpenAIWrapper(network)
        found["guidance"] = {"sent": counted(lambda: wrapper(x, timesteps, {"crossattn": context}))}

    sgm.distributed._mesh, sgm.distributed._axes = Mesh(tensor=2), {}
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(2)
    found["layers"] = measure(make_network(layers=LAYERS))
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    sgm.distributed.shutdown()


if __name__ == "__main__":
    main()
