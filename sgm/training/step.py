"""The module that DeepSpeed trains, and the engine around it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import sgm.distributed
from sgm.checkpoint import PREFIX
from sgm.models.video_diffusion import SATVideoDiffusionEngine, TrainingInputs


class TrainingModule(nn.Module):
    """Hold the network alone, so that text encoder and autoencoder are neither sharded nor saved with it.

    Its parameters have the names of the SAT checkpoint format (``model.diffusion_model.*``).

    Args:
        engine: the whole model.
    """

    def __init__(self, engine: SATVideoDiffusionEngine) -> None:
        super().__init__()
        self.model = engine.model
        self._losses = engine.training_losses

    def forward(self, inputs: TrainingInputs) -> torch.Tensor:
        """Return the loss of each sample, float32 (B,)."""
        return self._losses(inputs)


def start_deepspeed(
    module: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, section: Mapping[str, Any]
) -> Any:
    """Return the DeepSpeed engine that trains `module`.

    Args:
        module: in its precision, on its device (or on the CPU with ZeRO-3).
        optimizer: over the trained parameters.
        schedule: of the learning rate; stepped with the optimizer.
        section: the checked ``deepspeed`` section.
    """
    sgm.distributed.prepare_deepspeed()
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=schedule, config=dict(section), dist_init_required=False
    )
    return engine


def gather(engine: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the network's parameters by its own names, whole and on the CPU, on rank zero; nothing on other ranks.

    All ranks call it together: with ZeRO-3 each holds a part of every parameter.
    """
    import deepspeed

    wanted, tensors = set(names), {}
    for name, parameter in engine.module.named_parameters():
        name = name.removeprefix(PREFIX)
        if name in wanted:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if sgm.distributed.data_parallel_rank() == 0:
                    tensors[name] = parameter.detach().cpu().clone()
    return tensors


def plain_gradient_norm(engine: Any) -> torch.Tensor | None:
    """Return the norm of the gradients before the step; None where DeepSpeed computes it (ZeRO, fp16, bf16)."""
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    return nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def gradient_norm(engine: Any, plain: torch.Tensor | None) -> float:
    """Return the norm of the last step's gradients over all ranks, before clipping; not finite after an overflow."""
    norm = engine.get_global_grad_norm() if plain is None else plain
    return float("nan") if norm is None else float(norm)
