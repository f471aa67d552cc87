"""The inputs of a forward pass, on ranks that share samples.

The first rank of those that share a sample reads it, encodes it and draws what is random about it; the others receive
the result, which is small: latents, embeddings, noise. Encoding on each of them would take as long, and end in numbers
that could differ. Only where they share the VAE too (``cp_size``) do all of them get the clip, and encode together.

The ranks of one sample compute one loss. Each gets, of the gradient of a weight, the part that its own tokens
contribute (see `sgm.parallel.sequence`); `gradient_factor` makes up for DeepSpeed, which takes the mean over all ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import sgm.distributed
from sgm.models.training_inputs import training_inputs
from sgm.models.video_diffusion import SATVideoDiffusionEngine, TrainingInputs


def shared_batch(engine: SATVideoDiffusionEngine, read: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the batch that the first rank of a sample reads; clips only where this rank encodes.

    Args:
        engine: names what the clips are called.
        read: gives the batch; called on the first rank alone.
    """
    if sgm.distributed.sample_rank() > 0:
        return sgm.distributed.broadcast_in_sample_group(None)
    batch = read()
    encoded_here = sgm.distributed.context_parallel_size() > 1
    pixels = () if encoded_here else (engine.input_key, "image", "moments", "image_moments")
    sgm.distributed.broadcast_in_sample_group({name: value for name, value in batch.items() if name not in pixels})
    return batch


def shared_inputs(
    engine: SATVideoDiffusionEngine,
    batch: Mapping[str, Any],
    generators: Sequence[torch.Generator],
    *,
    idx: Sequence[int] | None = None,
) -> TrainingInputs:
    """Return `sgm.models.training_inputs` of a batch from `shared_batch`; the same on ranks that share it.

    Args:
        engine: the model.
        batch: of this rank and those that it shares samples with.
        generators: one CPU generator per sample.
        idx: timesteps instead of drawn ones.
    """
    inputs = None
    if sgm.distributed.sample_rank() == 0 or sgm.distributed.context_parallel_size() > 1:
        rank, num_ranks = sgm.distributed.data_parallel_rank(), sgm.distributed.data_parallel_size()
        inputs = training_inputs(engine, batch, generators, rank=rank, num_ranks=num_ranks, idx=idx)
    return sgm.distributed.broadcast_in_sample_group(inputs)


def gradient_factor() -> int:
    """Return what to multiply a loss by before the backward pass, so that gradients are those of whole samples."""
    return sgm.distributed.sequence_parallel_size()
