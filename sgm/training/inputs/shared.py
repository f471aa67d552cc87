"""Broadcast the inputs of a forward pass within a sample's group, the ranks that compute one sample together.

The first rank of the group reads and encodes the sample, draws its noise and broadcasts latents, embeddings and noise.
With a context parallel VAE (``cp_size``), the clip is broadcast and all ranks of the group encode it together.

All ranks have the same loss, and each the gradient of its own tokens (see `sgm.parallel.sequence`). DeepSpeed averages
gradients over all ranks, which `gradient_factor` compensates.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import sgm.distributed
from sgm.models.training_inputs import training_inputs
from sgm.models.video_diffusion import SATVideoDiffusionEngine, TrainingInputs


def shared_batch(engine: SATVideoDiffusionEngine, read: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Broadcast the result of `read` from the first rank of the sample's group.

    Unless the VAE is context parallel, pixels and moments stay on the first rank, which encodes alone.
    """
    if sgm.distributed.sample_rank() > 0:
        return sgm.distributed.broadcast_in_sample_group(None)
    batch = read()
    encoded_here = sgm.distributed.context_parallel_size() > 1
    pixels = ("mp4", "rejected", "image", "moments", "image_moments", "control", "control_moments", "mask")
    pixels = () if encoded_here else pixels
    sgm.distributed.broadcast_in_sample_group({name: value for name, value in batch.items() if name not in pixels})
    return batch


def shared_inputs(
    engine: SATVideoDiffusionEngine,
    batch: Mapping[str, Any],
    generators: Sequence[torch.Generator],
    *,
    idx: Sequence[int] | None = None,
) -> TrainingInputs:
    """Return `training_inputs` of a batch from `shared_batch`, the same on all ranks of the sample's group."""
    inputs = None
    if sgm.distributed.sample_rank() == 0 or sgm.distributed.context_parallel_size() > 1:
        rank, num_ranks = sgm.distributed.data_parallel_rank(), sgm.distributed.data_parallel_size()
        inputs = training_inputs(engine, batch, generators, rank=rank, num_ranks=num_ranks, idx=idx)
    return sgm.distributed.broadcast_in_sample_group(inputs)


def gradient_factor() -> int:
    """Return the factor on the loss that turns averaged gradients of shards into gradients of whole samples."""
    return sgm.distributed.sequence_parallel_size()
