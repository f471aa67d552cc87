"""Save a run: weights, their moving average, and the resume state."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import sgm.distributed
from sgm.log import get_logger, warn_once
from sgm.training.async_save import BackgroundSave, HostMemory
from sgm.training.build import Parts
from sgm.training.metrics import FILE, read_metrics
from sgm.training.optim.average import evaluation_weights, full_ema
from sgm.training.state import (
    FOLDER,
    ResumePoint,
    newest_state,
    publish_state,
    save_state,
    visit_state,
)
from sgm.training.state_files import write_state_file
from sgm.util import RunError
from sgm.weights.checkpoint import save_network, write_latest
from sgm.weights.files import PREFIX
from sgm.weights.lora.names import starts_at_zero

logger = get_logger(__name__)


class _NotFiniteError(RunError):
    """A weight is NaN or infinite."""


class Saver:
    """Save checkpoints (``keep_last``, ``save_full``, ``no_save_rng``); see `sgm.training.state` for the folders.

    With ``async_save``, a thread of each rank writes what `save` copies; see `sgm.training.async_save`.

    Attributes:
        saved: iteration of the newest checkpoint that is complete; None without one.
        best: with ``keep_best``, on rank zero, the iteration of the lowest validation loss and that loss.
        former_best: iterations of the lowest losses on other samples, before validation changed at a resume.

    Args:
        parts: of the run.
        validation_set: see `Evaluation`; None without evaluations.
    """

    def __init__(self, parts: Parts, validation_set: str | None = None) -> None:
        self.parts, self.args = parts, parts.plan.args
        self.saved: int | None = parts.point.iteration or None
        if self.saved is not None and not parts.point.has_weights():
            self.saved = None  # they were removed
        self.best: tuple[int, float] | None = None
        self.former_best: set[int] = set()
        if self.args.keep_best and sgm.distributed.rank() == 0:
            found = _best_kept(parts.folder, parts.point.iteration, validation_set)
            self.best = found.pop(validation_set, None)
            self.former_best = {iteration for iteration, _ in found.values()}
        network = parts.engine.network
        self.names = parts.plan.trainable.names
        if not parts.plan.trainable.adapters or self.args.save_full:
            self.names = tuple(network.state_dict().keys())
        self._memory = HostMemory()
        self._in_flight: BackgroundSave | None = None

    def save(self, iteration: int) -> None:
        """Write a checkpoint, or with ``async_save`` begin to. Collective: all ranks call it.

        Raises:
            RunError: the disk is full, or weights are not finite; earlier checkpoints are kept. That of a save that has
                begun is raised by `finish`, or by the next save.
        """
        if self.args.async_save:
            self._begin(iteration)
        elif not self.save_if_finite(iteration):
            raise RunError(self._not_finite(iteration))

    def save_if_finite(self, iteration: int) -> bool:
        """Write a checkpoint unless a weight is NaN or infinite; return whether it was written."""
        if self.args.async_save:
            self._begin(iteration)
            try:
                self.finish()
            except _NotFiniteError:
                return False
            return True
        if self.saved == iteration:
            return True
        weights, averages = self._gather(_copied)
        if sgm.distributed.any_rank(not _are_finite(weights)):
            return False
        with self._removed_if_it_fails(iteration):
            self._write_all(iteration, weights, averages)
        self._is_saved(iteration)
        return True

    def _gather(
        self, copy: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """Return copies of the weights to save, and of their averages with ``ema_decay``. Collective."""
        deepspeed = self.parts.deepspeed
        with evaluation_weights(deepspeed):
            weights = gather_parameters(deepspeed, self.names, copy)
        if self.args.ema_decay is None:
            return weights, None
        named = {name.removeprefix(PREFIX): p for name, p in deepspeed.module.named_parameters() if p.requires_grad}
        return weights, full_ema(deepspeed, named.items())

    def _is_saved(self, iteration: int) -> None:
        self.saved = iteration
        logger.info("saved %s", self.parts.folder / str(iteration))

    def _not_finite(self, iteration: int) -> str:
        return (
            f"after iteration {iteration} the weights are not finite and were not saved; {self.describe()}; "
            "continue from it with a lower deepspeed.optimizer.params.lr or deepspeed.gradient_clipping"
        )

    def _begin(self, iteration: int) -> None:
        """Copy what is to be saved, and let a thread write it. Collective: all ranks call it."""
        if iteration in (self.saved, self._in_flight and self._in_flight.iteration):
            return
        self._wait_for_former(iteration)
        self._memory.release()
        weights, averages = self._gather(self._memory.copy_dense)
        point, state = self._point(iteration), {}
        visit_state(
            self.parts.deepspeed,
            point,
            lambda path, content: state.update({path: self._memory.copy(content)}),
            with_rng=not self.args.no_save_rng,
        )

        def write() -> list[str]:
            if not _are_finite(weights):
                raise _NotFiniteError(self._not_finite(iteration))
            if is_writing_rank():
                self._write(iteration, weights, averages)
            for path, content in state.items():
                write_state_file(path, content)
            return [path.name for path in state]

        def publish(files: Collection[str]) -> None:
            publish_state(point, files)
            self._set_latest(iteration)

        self._in_flight = BackgroundSave(
            iteration, write=write, publish=publish, undo=lambda: self._remove_failed(iteration)
        )

    def _wait_for_former(self, iteration: int) -> None:
        """Wait for the save in flight, and say how long that took if it did not fit between two saves."""
        if (former := self._in_flight) is None:
            return
        begun, waits = time.perf_counter(), not former.done
        if waits:
            logger.warning("iteration %d: training waits until iteration %d is saved", iteration, former.iteration)
        self.finish()
        if waits:
            logger.warning(
                "waited %.1f s: saving takes longer than the iterations between saves; raise args.save_interval, or "
                "save to a faster disk",
                time.perf_counter() - begun,
            )

    @property
    def has_failed(self) -> bool:
        """Whether the save in flight is known to have failed; then all ranks call `finish`."""
        return self._in_flight is not None and self._in_flight.failed

    def poll(self) -> None:
        """Note the end of a save in flight, if it has ended well."""
        if self._in_flight is not None and self._in_flight.done and not self.has_failed:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if any. All ranks call it.

        Raises:
            RunError: it failed; earlier checkpoints are kept.
        """
        if (save := self._in_flight) is None:
            return
        save.wait()
        self._in_flight = None
        self._is_saved(save.iteration)

    def finish_after_failure(self) -> None:
        """Let the save in flight end, if it can: training has failed, on this rank or on all of them."""
        if self._in_flight is not None:
            self._in_flight.wait_after_failure()
            self.poll()

    def close(self) -> None:
        """Give up a save that is still in flight."""
        if self._in_flight is not None:
            self._in_flight.cancel()

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
        self.finish()  # before the former best is removed
        if sgm.distributed.rank() == 0:
            self.best = iteration, loss
            self._remove_old(iteration)
            logger.info(
                "the validation loss is the lowest yet; args.keep_best keeps %s", self.parts.folder / str(iteration)
            )

    @contextlib.contextmanager
    def _removed_if_it_fails(self, iteration: int) -> Iterator[None]:
        """Context: if a save fails, remove what was written of it, unless its state is already the newest.

        A full disk is an error of the rank that wrote, and a lost connection on the others.
        """
        try:
            yield
        except BaseException:
            if sgm.distributed.rank() == 0:
                self._remove_failed(iteration)
            raise

    def _remove_failed(self, iteration: int) -> None:
        """Remove what was written of a checkpoint, unless its state is already the newest."""
        folder = self.parts.folder
        if newest_state(folder) != str(iteration):
            for part in (folder / str(iteration), folder / f"{iteration}-ema", folder / FOLDER / str(iteration)):
                shutil.rmtree(part, ignore_errors=True)

    def _point(self, iteration: int) -> ResumePoint:
        parts = self.parts
        moments = getattr(parts.engine.require_loss().sigma_sampler, "moments", None)
        return dataclasses.replace(
            parts.point,
            timesteps=None if moments is None else moments.state(),
            run=parts.folder,
            iteration=iteration,
            samples=parts.samples_before(iteration),
            micro_batches=0 if parts.buckets is None else parts.micro_batches_before(iteration),
        )

    def _write_all(
        self, iteration: int, weights: dict[str, torch.Tensor], averages: dict[str, torch.Tensor] | None
    ) -> None:
        """Write weights, averages and state, then remove old checkpoints. Collective: all ranks call it."""
        if is_writing_rank():
            self._write(iteration, weights, averages)
        sgm.distributed.wait_for_all()  # collectives have a timeout
        save_state(self.parts.deepspeed, self._point(iteration), with_rng=not self.args.no_save_rng)
        if sgm.distributed.rank() == 0:
            self._set_latest(iteration)

    def _set_latest(self, iteration: int) -> None:
        """On rank zero, make complete weights the newest ones, and remove old checkpoints."""
        write_latest(self.parts.folder, iteration)
        self._remove_old(iteration)

    def _write(
        self, iteration: int, weights: dict[str, torch.Tensor], averages: dict[str, torch.Tensor] | None
    ) -> None:
        """Write weights and averages of this rank's tensor parallel shard."""
        parts, network = self.parts, self.parts.engine.network
        written: dict[str, Any] = {"patch_size": network.patch_size, "shard": network.tensor_shard, "latest": False}
        written["any_values"] = True  # the weights of a training that failed are its record
        if averages is not None:
            smooth = {name: averages.get(name, value).to(value.dtype) for name, value in weights.items()}
            save_network(parts.folder, f"{iteration}-ema", smooth, adapters=parts.adapters, **written)
        save_network(parts.folder, iteration, weights, adapters=parts.adapters, **written)
        if parts.plan.trainable.adapters and not any(t.any() for name, t in weights.items() if starts_at_zero(name)):
            said = (
                "the adapters are still without effect: every B matrix is zero, or w2 of LoKr; is the learning rate 0?"
            )
            warn_once(logger, [said])

    def _remove_old(self, newest: int) -> None:
        """Remove all checkpoints but the last ``keep_last`` up to the `newest` and the best one."""
        if self.args.keep_last is None:
            return
        folder = self.parts.folder
        numbers = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
        # Larger ones are of a save that was killed before its state was complete, from which nobody resumes.
        kept = sorted((number for number in numbers if number <= newest), reverse=True)[: self.args.keep_last]
        for old in {*numbers} - {*kept}:
            if old in self.former_best or (self.best is not None and old == self.best[0]):
                continue
            for name in (str(old), f"{old}-ema"):
                shutil.rmtree(folder / name, ignore_errors=True)

    def describe(self) -> str:
        """Return the part of a message about the newest checkpoint."""
        if self.saved is None:
            return f"nothing was saved yet; args.load ({self.args.load}) is unchanged"
        return f"the newest checkpoint is {self.parts.folder / str(self.saved)}"


def _best_kept(folder: Path, iteration: int, now: str | None) -> dict[str | None, tuple[int, float]]:
    """Return iteration and validation loss of the best checkpoints of a run that is resumed after `iteration`.

    They are by the validation set of their losses, which cannot be compared with those of `now`; lines of earlier
    versions do not say it.
    """
    lines = [line for line in read_metrics(folder / FILE) if line["iteration"] <= iteration]
    lines = [line for line in lines if line.get("validation_loss") is not None]
    kept: dict[str | None, tuple[int, float]] = {}
    for line in lines:
        step, loss, name = line["iteration"], line["validation_loss"], line.get("validation_set", now)
        if (folder / str(step)).is_dir() and (name not in kept or loss < kept[name][1]):
            kept[name] = step, loss
    last = lines[-1].get("validation_set", now) if lines else now
    if now not in (None, last):
        logger.warning(
            "the validation loss is of other samples than before iteration %d (clips, their number, ranks or the loss "
            "changed): args.keep_best does not compare them%s",
            lines[-1]["iteration"] + 1,
            f", and keeps {folder / str(kept[last][0])}, the best of those before" if last in kept else "",
        )
    return kept


def is_writing_rank() -> bool:
    """Whether this rank writes weights: rank zero, or the ranks of its tensor-parallel group."""
    return sgm.distributed.rank() == sgm.distributed.tensor_parallel_rank()


def _are_finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True)


def gather_parameters(
    engine: Any, names: Sequence[str], copy: Callable[[torch.Tensor], torch.Tensor] = _copied
) -> dict[str, torch.Tensor]:
    """Gather parameters and buffers by their names, and `copy` them on writing ranks; other ranks get none.

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
                    tensors[name] = copy(parameter.detach())
    for name, buffer in engine.module.named_buffers():
        if (name := name.removeprefix(PREFIX)) in wanted and is_writing_rank():
            tensors[name] = copy(buffer)
    return tensors
