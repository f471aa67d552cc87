"""One optimizer step: the DeepSpeed engine, gradient norms, and flags and signals that stop a run."""

import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import sgm.distributed
from sgm.log import get_logger, warn_once
from sgm.models.video_diffusion import SATVideoDiffusionEngine, TrainingInputs
from sgm.training.optim.optimizer import steps_in_slices
from sgm.training.optim.slices import SlicedStep
from sgm.util import to_device

logger = get_logger(__name__)


class TrainingModule(nn.Module):
    """The network of an engine with its loss, without text encoder and VAE, which are neither sharded nor saved.

    Its parameters have the names of the SAT checkpoint format (``model.diffusion_model.*``).
    """

    def __init__(self, engine: SATVideoDiffusionEngine) -> None:
        super().__init__()
        self.model = engine.model
        self._losses = engine.training_losses

    def forward(self, inputs: TrainingInputs) -> torch.Tensor:
        """Return the loss of each sample, float32 (B,)."""
        return self._losses(inputs)


def nonzero_index(weights: Sequence[float]) -> list[int] | slice:
    """Return the index of samples with nonzero weight; the others are padding, see `sgm.data.buckets.plan`."""
    return [i for i, weight in enumerate(weights) if weight] if 0 in weights else slice(None)


def weighted_mean(losses: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Return the mean over B of losses (B,) multiplied by weights (B,)."""
    if any(weight != 1 for weight in weights):
        losses = losses * to_device(torch.tensor(weights, dtype=losses.dtype), losses.device)
    return losses.mean()


def start_deepspeed(
    module: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, section: Mapping[str, Any]
) -> Any:
    """Return the DeepSpeed engine that trains `module`, which is already in the precision of the run.

    The module is on this rank's device, or on the CPU with ZeRO-3. `section` is from `engine_config`.
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
    zero: Any = engine.optimizer
    if hasattr(zero, "_get_preflattened_grad_partition") and not zero.cpu_offload and steps_in_slices(optimizer):
        SlicedStep(zero)
    return engine


def gradient_norm_before_step(engine: Any) -> torch.Tensor | None:
    """Return the norm of all gradients; None with ZeRO, fp16 or bf16, since DeepSpeed computes it in its step."""
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    with_gradient = [p for p in engine.module.parameters() if p.grad is not None]
    sharded, whole = (
        nn.utils.get_total_norm([p.grad for p in with_gradient if vars(p).get("model_parallel", False) is is_sharded])
        for is_sharded in (True, False)
    )
    squares = sharded.square().to(sgm.distributed.device())  # the norm of no tensors is on the CPU
    if (group := sgm.distributed.tensor_group()) is not None:
        dist.all_reduce(squares, group=group)
    return (squares + whole.square().to(squares.device)).sqrt()


def gradient_norm_after_step(engine: Any, before: torch.Tensor | None) -> float:
    """Return the norm of the last step's gradients before clipping; not finite after an overflow.

    `before` is the result of `gradient_norm_before_step`.
    """
    norm = engine.get_global_grad_norm() if before is None else before
    return float("nan") if norm is None else float(norm)


_STOPS = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows lacks the last


class StopSignals:
    """Context in which SIGTERM, SIGUSR1 and SIGINT stop the run after the current step, of training or sampling.

    A second SIGINT interrupts it.

    Attributes:
        received: name of the received signal; empty before.
    """

    def __init__(self) -> None:
        self.received = ""
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in [getattr(signal, name) for name in _STOPS if hasattr(signal, name)]:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        warn_once(logger, [f"{self.received}: finishing this step, then saving; interrupt again to stop at once"])


class LossesOfStep:
    """The losses of an optimizer step, for a sampler that draws timesteps by them; of any other sampler, nothing.

    As `StepFlags`, they are all-reduced and copied to the host during the backward pass.

    Args:
        sampler: of noise levels; with `moments`, as `DiscreteSampling` has with the distribution ``loss``.
        device: of the losses.
    """

    def __init__(self, sampler: Any, device: torch.device) -> None:
        self._sampler, self.moments = sampler, getattr(sampler, "moments", None)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        self._sums = none if self.moments is None else self.moments.sums(none, none)
        self._host = torch.zeros(self._sums.shape, pin_memory=device.type != "cpu")

    def weights(self, idx: torch.Tensor) -> torch.Tensor | None:
        """Return the weight (B,) of samples with the timesteps `idx` (B,) in the loss of training; None for 1."""
        return None if self.moments is None else self._sampler.weights(idx)

    def add(self, idx: torch.Tensor, losses: torch.Tensor) -> None:
        """Add timesteps (B,) and losses (B,) of a micro-batch; the first rank of a sample's group counts them."""
        if self.moments is not None and sgm.distributed.sample_rank() == 0:
            self._sums += self.moments.sums(idx, losses)

    def start_all_reduce(self) -> None:
        """Start the all-reduce; all ranks call it before that of `StepFlags`, whose event it is read after."""
        if self.moments is not None:
            self._host.copy_(sgm.distributed.all_reduce_(self._sums), non_blocking=True)

    def update(self) -> None:
        """Take the losses of all ranks into the sampler, after `StepFlags.read`; later steps are drawn by them."""
        if self.moments is not None:
            self.moments.update(self._host)
            self._sums.zero_()


class StepFlags:
    """Flags of all ranks, known before the optimizer step: a bad loss, a rank was asked to stop, a save failed.

    They are all-reduced and copied to the host during the backward pass, so reading them does not stall the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flags = torch.zeros(3, device=device)
        self._host = torch.zeros(3, pin_memory=device.type != "cpu")
        self._event = torch.Event(device) if device.type != "cpu" else None

    def add(self, losses: torch.Tensor) -> None:
        """Check the losses (B,) of a micro-batch."""
        bad = (~torch.isfinite(losses.detach())).any().float()
        self._flags[0] = torch.maximum(self._flags[0], bad)

    def start_all_reduce(self, *, stop: bool, save_failed: bool = False) -> None:
        """Start the all-reduce of the flags; all ranks call it before the last backward pass of a step."""
        self._flags[1], self._flags[2] = float(stop), float(save_failed)
        sgm.distributed.all_reduce_(self._flags, largest=True)
        self._host.copy_(self._flags, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[bool, bool, bool]:
        """Return and reset the flags: a loss is not finite, a rank was asked to stop, a save failed."""
        if self._event is not None:
            self._event.synchronize()
        bad, stop, save_failed = self._host.bool().tolist()
        self._flags.zero_()
        return bad, stop, save_failed
