"""Save a run: weights, their moving average, and the resume state."""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import sgm.distributed
from sgm.log import get_logger, warn_once
from sgm.training.build import Parts
from sgm.training.metrics import FILE, read_metrics
from sgm.training.optim.average import evaluation_weights, full_ema
from sgm.training.state import FOLDER, newest_state, save_state
from sgm.util import RunError
from sgm.weights.checkpoint import save_network, write_latest
from sgm.weights.files import PREFIX

logger = get_logger(__name__)


class Saver:
    """Save checkpoints (``keep_last``, ``save_full``, ``no_save_rng``); see `sgm.training.state` for the folders.

    Attributes:
        saved: iteration of the newest checkpoint; None without one.
        best: with ``keep_best``, on rank zero, the iteration of the lowest validation loss and that loss.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts, self.args = parts, parts.plan.args
        self.saved: int | None = parts.point.iteration or None
        if self.saved is not None and not parts.point.has_weights():
            self.saved = None  # they were removed
        self.best: tuple[int, float] | None = None
        if self.args.keep_best and sgm.distributed.rank() == 0:
            self.best = _best_kept(parts.folder, parts.point.iteration)
        network = parts.engine.network
        self.names = parts.plan.trainable.names
        if not parts.plan.trainable.adapters or self.args.save_full:
            self.names = tuple(network.state_dict().keys())

    def save(self, iteration: int) -> None:
        """Write a checkpoint. Collective: all ranks call it.

        Raises:
            RunError: the disk is full, or weights are not finite; earlier checkpoints are kept.
        """
        if not self.save_if_finite(iteration):
            raise RunError(
                f"after iteration {iteration} the weights are not finite and were not saved; {self.describe()}; "
                "continue from it with a lower deepspeed.optimizer.params.lr or deepspeed.gradient_clipping"
            )

    def save_if_finite(self, iteration: int) -> bool:
        """Write a checkpoint unless a weight is NaN or infinite; return whether it was written."""
        if self.saved == iteration:
            return True
        parts = self.parts
        with evaluation_weights(parts.deepspeed):
            weights = gather_parameters(parts.deepspeed, self.names)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
        if not all(sgm.distributed.all_gather_objects(finite)):
            return False
        averages = None
        if self.args.ema_decay is not None:
            named = {
                name.removeprefix(PREFIX): p for name, p in parts.deepspeed.module.named_parameters() if p.requires_grad
            }
            averages = full_ema(parts.deepspeed, named.items())
        with self._removed_if_it_fails(iteration):
            self._write_all(iteration, weights, averages)
        self.saved = iteration
        logger.info("saved %s", parts.folder / str(iteration))
        return True

    def keep_if_best(self, iteration: int, loss: float) -> None:
        """With ``keep_best``, keep the checkpoint with the lowest validation loss. Collective: all ranks call it.

        Args:
            iteration: whose weights have been evaluated.
            loss: their validation loss.
        """
        if not self.args.keep_best:
            return
        is_best = math.isfinite(loss) and (self.best is None or loss < self.best[1])
        if not sgm.distributed.broadcast_from_rank_zero(is_best):
            return
        self.save(iteration)
        if sgm.distributed.rank() == 0:
            self.best = iteration, loss
            self._remove_old()
            logger.info(
                "the validation loss is the lowest yet; args.keep_best keeps %s", self.parts.folder / str(iteration)
            )

    @contextlib.contextmanager
    def _removed_if_it_fails(self, iteration: int) -> Iterator[None]:
        """Context: on a full disk, remove what was written of a checkpoint, unless its state is already the newest."""
        try:
            yield
        except RunError:
            folder = self.parts.folder
            if sgm.distributed.rank() == 0 and newest_state(folder) != str(iteration):
                for part in (folder / str(iteration), folder / f"{iteration}-ema", folder / FOLDER / str(iteration)):
                    shutil.rmtree(part, ignore_errors=True)
            raise

    def _write_all(
        self, iteration: int, weights: dict[str, torch.Tensor], averages: dict[str, torch.Tensor] | None
    ) -> None:
        """Write weights, averages and state, then remove old checkpoints. Collective: all ranks call it."""
        parts = self.parts
        if is_writing_rank():
            self._write(iteration, weights, averages)
        point = dataclasses.replace(
            parts.point,
            run=parts.folder,
            iteration=iteration,
            samples=parts.samples_before(iteration),
            micro_batches=0 if parts.buckets is None else parts.micro_batches_before(iteration),
        )
        save_state(parts.deepspeed, point, with_rng=not self.args.no_save_rng)
        if sgm.distributed.rank() == 0:
            write_latest(parts.folder, iteration)
            self._remove_old()

    def _write(
        self, iteration: int, weights: dict[str, torch.Tensor], averages: dict[str, torch.Tensor] | None
    ) -> None:
        """Write weights and averages of this rank's tensor parallel shard."""
        parts, network = self.parts, self.parts.engine.network
        written: dict[str, Any] = {"patch_size": network.patch_size, "shard": network.tensor_shard, "latest": False}
        if averages is not None:
            smooth = {name: averages.get(name, value).to(value.dtype) for name, value in weights.items()}
            save_network(parts.folder, f"{iteration}-ema", smooth, adapters=parts.adapters, **written)
        save_network(parts.folder, iteration, weights, adapters=parts.adapters, **written)
        if parts.plan.trainable.adapters and not any(t.any() for name, t in weights.items() if ".matrix_B." in name):
            warn_once(
                logger, ["the adapters are still without effect: every B matrix is zero; is the learning rate 0?"]
            )

    def _remove_old(self) -> None:
        """Remove all checkpoints but the newest ``keep_last`` and the best one."""
        if self.args.keep_last is None:
            return
        folder = self.parts.folder
        kept = sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)
        for old in kept[self.args.keep_last :]:
            if self.best is not None and old == self.best[0]:
                continue
            for name in (str(old), f"{old}-ema"):
                shutil.rmtree(folder / name, ignore_errors=True)

    def describe(self) -> str:
        """Return the part of a message about the newest checkpoint."""
        if self.saved is None:
            return f"nothing was saved yet; args.load ({self.args.load}) is unchanged"
        return f"the newest checkpoint is {self.parts.folder / str(self.saved)}"


def _best_kept(folder: Path, iteration: int) -> tuple[int, float] | None:
    """Return iteration and validation loss of the best checkpoint of a run that is resumed after `iteration`."""
    lines = [line for line in read_metrics(folder / FILE) if line["iteration"] <= iteration]
    losses = [(line["validation_loss"], line["iteration"]) for line in lines if line.get("validation_loss") is not None]
    kept = [(step, loss) for loss, step in sorted(losses) if (folder / str(step)).is_dir()]
    return kept[0] if kept else None


def is_writing_rank() -> bool:
    """Whether this rank writes weights: rank zero, or the ranks of its tensor-parallel group."""
    return sgm.distributed.rank() == sgm.distributed.tensor_parallel_rank()


def gather_parameters(engine: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Gather parameters by their names in the network, on the CPU of writing ranks; other ranks get none.

    Collective, since ZeRO-3 shards every parameter. With tensor parallelism, each writing rank gets its shard of the
    layers.
    """
    import deepspeed

    wanted, tensors = set(names), {}
    for name, parameter in engine.module.named_parameters():
        name = name.removeprefix(PREFIX)
        if name in wanted:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if is_writing_rank():
                    tensors[name] = parameter.detach().cpu().clone()
    return tensors
