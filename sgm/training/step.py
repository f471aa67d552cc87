"""The module that DeepSpeed trains, and the engine around it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import sgm.distributed
from sgm.models.video_diffusion import SATVideoDiffusionEngine, TrainingInputs
from sgm.weights.files import PREFIX


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


def counted(weights: Sequence[float]) -> list[int] | slice:
    """Return the index of the samples that count; those of weight 0 only fill up, see `sgm.data.buckets.plan`."""
    return [i for i, weight in enumerate(weights) if weight] if 0 in weights else slice(None)


def weighted_mean(losses: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Return the mean of the losses (B,), each times its weight."""
    if any(weight != 1 for weight in weights):
        losses = losses * torch.tensor(weights, dtype=losses.dtype, device=losses.device)
    return losses.mean()


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
        model=module,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=dict(section),
        dist_init_required=False,
        mpu=sgm.distributed.layer_groups(),
    )
    return engine


def writes_part() -> bool:
    """Whether this rank writes what there is once: of the whole network, or of its part of the layers."""
    return sgm.distributed.rank() == sgm.distributed.tensor_parallel_rank()


def gather(engine: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the network's parameters by its own names, on the CPU, where `writes_part`; nothing on other ranks.

    All ranks call it together: with ZeRO-3 each holds a piece of every parameter. Ranks that share layers get their
    part of each layer, as files hold it.
    """
    import deepspeed

    wanted, tensors = set(names), {}
    for name, parameter in engine.module.named_parameters():
        name = name.removeprefix(PREFIX)
        if name in wanted:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if writes_part():
                    tensors[name] = parameter.detach().cpu().clone()
    return tensors


def plain_gradient_norm(engine: Any) -> torch.Tensor | None:
    """Return the norm of the gradients before the step; None where DeepSpeed computes it (ZeRO, fp16, bf16)."""
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    with_gradient = [p for p in engine.module.parameters() if p.grad is not None]
    divided, whole = (
        nn.utils.get_total_norm([p.grad for p in with_gradient if vars(p).get("model_parallel", False) is is_divided])
        for is_divided in (True, False)
    )
    squares = divided.square().to(sgm.distributed.device())  # the norm of nothing lies on the CPU
    if (group := sgm.distributed.tensor_group()) is not None:
        dist.all_reduce(squares, group=group)
    return (squares + whole.square().to(squares.device)).sqrt()


def gradient_norm(engine: Any, plain: torch.Tensor | None) -> float:
    """Return the norm of the last step's gradients over all ranks, before clipping; not finite after an overflow."""
    norm = engine.get_global_grad_norm() if plain is None else plain
    return float("nan") if norm is None else float(norm)
