"""The training loop.

Clip, noise and timestep of training sample n (0, 1, 2, ... over the whole run) depend only on the seed and n; with
`uniform_sampling`, the timestep on the rank too. Step s with global batch G trains on the samples s·G to (s+1)·G − 1,
for any number of ranks and micro batches and any group size. A run is resumed by the number of its next sample.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

import sgm.distributed
from sgm.config.args import TrainingArgs
from sgm.config.load import Config
from sgm.data.order import derive_seed
from sgm.log import get_logger, launcher_note, warn_once
from sgm.models.video_diffusion import TrainingInputs
from sgm.training.build import Parts, build
from sgm.training.evaluate import Evaluation, EvaluationStoppedError
from sgm.training.inputs.precompute import before_encoding, encode_ahead
from sgm.training.inputs.shared import gradient_factor, shared_batch, shared_inputs
from sgm.training.metrics import LossByQuarter, Metrics, draw_curve
from sgm.training.optim.average import evaluation_weights
from sgm.training.prepare import agree, prepare, with_recomputation
from sgm.training.save import Saver
from sgm.training.state import repair_latest
from sgm.training.step import (
    LossesOfStep,
    StepFlags,
    StopSignals,
    gradient_norm_after_step,
    gradient_norm_before_step,
    nonzero_index,
    weighted_mean,
)
from sgm.training.timing import EVALUATE, PHASES, PhaseClock, StallWatch, slow_ranks
from sgm.training.utilization import Work, peak_flops
from sgm.util import InputError, RunError, default, peak_memory

logger = get_logger(__name__)


def sample_generator(seed: int, number: int) -> torch.Generator:
    """Return the random generator of training sample `number`."""
    return torch.Generator().manual_seed(derive_seed(seed, "sample", number))


@dataclass
class Summary:
    """The result of a run.

    Attributes:
        folder: of the run.
        iteration: optimizer steps done, including those before a resume.
        total: optimizer steps of the whole run.
        loss: mean training loss in the last line of metrics; None without a step.
        stopped: reason of an early end; empty otherwise.
        exit_code: ``args.stop_exit_code``, for a run that a signal stopped.
        seconds: wall time.
        best: the iteration with the lowest validation loss and that loss, with ``args.keep_best``.
        samples: videos that this rank sampled at evaluations.
    """

    folder: Path
    iteration: int = 0
    total: int = 0
    loss: float | None = None
    stopped: str = ""
    exit_code: int = 0
    seconds: float = 0.0
    best: tuple[int, float] | None = None
    samples: list[Path] = field(default_factory=list)

    @property
    def stopped_by_signal(self) -> bool:
        """Whether a signal, to whichever rank, ended the run early."""
        return bool(self.stopped) and not self.stopped.startswith("args.")

    def __str__(self) -> str:
        """Return the final message of a run."""
        state = f"stopped by {self.stopped}, saved" if self.stopped else "done"
        lines = [f"iteration {self.iteration} of {self.total}: {state} ({self.seconds:.1f} s)"]
        lines.append(f"sample from it with args.load={self.folder}")
        if self.best is not None:
            iteration, loss = self.best
            lines.append(f"the lowest validation loss is {loss:.4f}: args.load={self.folder / str(iteration)}")
        if self.stopped:
            note = launcher_note() if self.stopped_by_signal else ""
            lines.append(f"the same command resumes it with args.resume=auto{note}")
        return "\n".join(lines)


def train(config: Config) -> Summary:
    """Start or resume the run described by `config`, and train to its end.

    Raises:
        InputError: configuration, data or weights are wrong; found before weights are read if possible.
        RunError: training failed. Earlier checkpoints stay loadable.
    """
    start = time.perf_counter()
    sgm.distributed.configure(config.args)
    config = _with_caches(config)
    plan = prepare(config)
    config = plan.config
    sgm.distributed.initialize()
    plan = with_recomputation(agree(plan))
    sgm.distributed.initialize(mesh=plan.mesh)
    if plan.is_complete:
        assert plan.resume is not None and plan.total_iters is not None
        plan.resume.require_weights()
        if sgm.distributed.rank() == 0:
            repair_latest(plan.resume)
        logger.info("%s has all %d iterations; args.resume=none starts a new run", plan.resume.run, plan.total_iters)
        return Summary(plan.resume.run, plan.resume.iteration, plan.total_iters)
    parts = build(config, plan)
    # Messages start on a line of their own, above the progress bar.
    with StopSignals() as signals, logging_redirect_tqdm(loggers=[get_logger()]):
        run = TrainingRun(config, parts, signals)
        try:
            run.fit()
        except Exception:
            run.saver.finish_after_failure()
            raise
        finally:
            run.close()
    run.summary.seconds = time.perf_counter() - start
    return run.summary


def _with_caches(config: Config) -> Config:
    """Encode clips and captions first, if ``args.precompute`` asks for it."""
    assert isinstance(config.args, TrainingArgs)
    if not config.args.precompute:
        return config
    prepare(before_encoding(config))  # what is wrong is said before hours of encoding
    sgm.distributed.initialize()
    return encode_ahead(config)


class TrainingRun:
    """The training loop of one process, over the parts of a run with a checked `config`."""

    def __init__(self, config: Config, parts: Parts, signals: StopSignals) -> None:
        self.args, self.parts, self.signals = parts.plan.args, parts, signals
        self.device = sgm.distributed.device()
        self.iteration = parts.point.iteration
        self.summary = Summary(parts.folder, self.iteration, parts.total_iters, exit_code=self.args.stop_exit_code)
        sampler = parts.engine.require_loss().sigma_sampler
        self.flags, self.losses = StepFlags(self.device), LossesOfStep(sampler, self.device)
        self.quarters = LossByQuarter(self.device, num_idx=sampler.num_idx)
        self.evaluation = None
        if self.args.eval_interval is not None:
            self.evaluation = Evaluation(
                config,
                parts.engine,
                parts.valid_data,
                inputs=parts.valid_inputs,
                vae_waits=parts.plan.caches.vae_waits,
                folder=parts.folder,
                micro_batch=parts.deepspeed.train_micro_batch_size_per_gpu(),
                in_step=parts.deepspeed.zero_optimization_stage() == 3,
                network_in_use=parts.network_in_use,
                asked_to_stop=lambda: bool(signals.received),
            )
        self.saver = Saver(parts, None if self.evaluation is None else self.evaluation.validation_set)
        self.summary.best = self.saver.best
        self.metrics = None
        if sgm.distributed.rank() == 0:
            self.metrics = Metrics(
                parts.folder,
                total_iters=parts.total_iters,
                config=config.merged,
                wandb=self.args.wandb,
                wandb_project=self.args.wandb_project_name,
                experiment=self.args.experiment_name,
                resume_from=self.iteration,
            )
        self.clock = PhaseClock(self.device)
        self.watch = StallWatch(sgm.distributed.progress_of_ranks) if self.metrics is not None else None
        self.work = Work(
            parts.engine.network,
            trains_all=not parts.plan.trainable.adapters,
            peak=peak_flops(self.device, parts.plan.dtype, self.args.peak_tflops),
        )
        self._told: set[tuple[int | None, str]] = set()
        self.skipped_in_row = 0
        self.save_failed = False
        self._norm_before: torch.Tensor | None = None
        self._lr = 0.0
        self._logged_at, self._logged_iteration = time.perf_counter(), self.iteration
        self._logged_samples = parts.samples_before(self.iteration)

    def close(self) -> None:
        """Release the run folder and close the metrics, without saving."""
        self.saver.close()
        if self.parts.lock is not None:
            self.parts.lock.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.watch is not None:
            self.watch.close()

    def fit(self) -> None:
        """Train to the last iteration, or until stopped by a signal or ``args.exit_interval``."""
        first, batches = self.iteration, iter(self.parts.loader)
        self.parts.deepspeed.train()
        eval_interval = default(self.args.eval_interval, self.parts.total_iters)
        logger.info("training: iterations %d to %d", first + 1, self.parts.total_iters)
        while self.iteration < self.parts.total_iters and not self.summary.stopped:
            self.clock.iteration = self.iteration + 1
            stop = self._guarded_step(batches)
            self.iteration += 1
            if self.watch is not None:
                self.watch.step_done()
            self.summary.iteration = self.iteration
            self.saver.poll()
            if self.save_failed:
                self.saver.finish()
            done = self.iteration == self.parts.total_iters
            if stop:
                self.summary.stopped = self._signal()
            last = done or stop or self.iteration - first == self.args.exit_interval
            if self.iteration % self.args.log_interval == 0 or last:
                self._log()
            elif self.metrics is not None:
                self.metrics.step_done(self.iteration)
            if self._is_due(self.args.save_interval) or last:
                with self.clock("save"):
                    self.saver.save(self.iteration)
                if self.watch is not None:
                    self.watch.start_again()
            if self.evaluation is not None and not stop:  # a signal leaves no time for it
                if self._is_due(eval_interval) or done:
                    with self.clock(EVALUATE):
                        self._evaluate()
                    if self.summary.stopped:
                        with self.clock("save"):
                            self.saver.save(self.iteration)
                    if self.watch is not None:
                        self.watch.start_again()
            if last and not done and not self.summary.stopped:
                self.summary.stopped = f"args.exit_interval={self.args.exit_interval}"
        with self.clock("save"):
            self.saver.finish()
        if self.metrics is not None and self.iteration > first:
            draw_curve(self.parts.folder / "metrics.jsonl", self.parts.folder / "curve.png")

    def _signal(self) -> str:
        """Return what asked the run to stop."""
        return self.signals.received or "a signal to another rank"

    def _is_due(self, interval: int | str) -> bool:
        """Whether an interval, in iterations or written as epochs, ends with the iteration that is done."""
        if isinstance(interval, int):
            return self.iteration % interval == 0
        every = int(interval.split()[0])
        now, before = (self.parts.epochs_before(iteration) for iteration in (self.iteration, self.iteration - 1))
        return now // every > before // every

    def _guarded_step(self, batches: Iterator[Any]) -> bool:
        """Run one step; report a failure with its iteration and clips."""
        taken: list[Mapping[str, Any]] = []
        try:
            return self._step(batches, taken)
        except InputError:
            raise
        except Exception as error:
            self.saver.finish_after_failure()
            reason, saved = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}", None
            if isinstance(error, _NotFiniteError):
                try:
                    saved = self.saver.save_if_finite(self.iteration)
                except RunError as failure:
                    reason += f"\nthe weights before it could not be saved: {failure}"
            raise RunError(self._failure(reason, taken, saved)) from error

    def _step(self, batches: Iterator[Any], taken: list[Mapping[str, Any]]) -> bool:
        """Run one optimizer step and append its batches to `taken`; return whether any rank was asked to stop."""
        deepspeed = self.parts.deepspeed
        skipped_before = deepspeed.skipped_steps
        stop = False
        accumulation = deepspeed.gradient_accumulation_steps()
        for micro in range(accumulation):
            batch, inputs = self._next_inputs(batches, taken)
            last = micro == accumulation - 1
            with self.parts.network_in_use, self.clock("network"):
                losses = deepspeed(inputs)
                self.flags.add(losses)
                index, weights = nonzero_index(batch["weight"]), self.losses.weights(inputs.idx)
                counted = inputs.idx[index], losses.detach()[index]
                self.quarters.add(*counted, None if weights is None else weights[index])
                self.losses.add(*counted)
                if weights is not None:
                    losses = losses * weights
                if last:
                    with self.clock("communication"):
                        self.losses.start_all_reduce()
                        self.flags.start_all_reduce(stop=bool(self.signals.received), save_failed=self.saver.has_failed)
                deepspeed.backward(weighted_mean(losses, batch["weight"]) * gradient_factor())
            if last:
                bad, stop, self.save_failed = self.flags.read()
                if bad:
                    raise _NotFiniteError("a loss is not finite (NaN or infinity)")
                self.losses.update()
                if stop or self._logs_next():
                    self._norm_before = gradient_norm_before_step(deepspeed)
                self._lr = self.parts.deepspeed.lr_scheduler.get_last_lr()[0]
            with self.clock("network"):
                deepspeed.step()
        self.skipped_in_row = self.skipped_in_row + 1 if deepspeed.skipped_steps > skipped_before else 0
        if self.skipped_in_row >= self.args.max_skipped_steps:
            raise _NotFiniteError(
                f"{self.skipped_in_row} steps in a row were skipped because gradients overflow fp16 "
                f"(args.max_skipped_steps={self.args.max_skipped_steps})"
            )
        return stop

    def _next_inputs(
        self, batches: Iterator[Any], taken: list[Mapping[str, Any]]
    ) -> tuple[Mapping[str, Any], TrainingInputs]:
        """Read and encode the next batch of this rank's sample group, and append it to `taken`."""
        engine = self.parts.engine

        def read() -> Any:
            with self.clock("data"):
                return next(batches)

        with self.clock("communication"):
            batch = shared_batch(engine, read)
        taken.append(batch)
        is_first = sgm.distributed.sample_rank() == 0
        if is_first:
            self.parts.bad_clips.add(batch["failures"])
        generators = [sample_generator(self.args.seed, number) for number in batch["number"]]
        with self.clock("encode" if is_first or sgm.distributed.context_parallel_size() > 1 else "communication"):
            inputs = shared_inputs(engine, batch, generators)
        if is_first:
            self.work.add(inputs, sum(1 for weight in batch["weight"] if weight))
        return batch, inputs

    def _logs_next(self) -> bool:
        """Return whether metrics are logged after the current step."""
        following = self.iteration + 1
        ends = (self.parts.total_iters, self.parts.point.iteration + (self.args.exit_interval or 0))
        return following % self.args.log_interval == 0 or following in ends

    def _failure(self, reason: str, taken: list[Mapping[str, Any]], saved: bool | None) -> str:
        """Return the message about a failed step: iteration, clips, newest checkpoint, advice."""
        clips = sorted({path for batch in taken for path in batch["path"]})
        shown = ", ".join(clips[:8]) + (f" and {len(clips) - 8} more" if len(clips) > 8 else "")
        lines = [
            f"iteration {self.iteration + 1} failed: {reason}",
            f"samples of this rank in it: {shown or 'none were read'}",
        ]
        if saved is False:
            lines.append("the weights themselves are not finite any more and were not saved")
        return "\n".join([*lines, self.saver.describe(), _hint(reason)])

    def _log(self) -> None:
        """All-reduce the metrics since the last line and write a new line."""
        self.quarters.reduce(sgm.distributed.all_reduce_)
        values = self.quarters.values()
        self.quarters.reset()
        self.summary.loss = values.get("loss")
        now = time.perf_counter()
        steps, samples = self.iteration - self._logged_iteration, self.parts.samples_before(self.iteration)
        elapsed, more = now - self._logged_at, samples - self._logged_samples
        self._logged_at, self._logged_iteration, self._logged_samples = now, self.iteration, samples
        bad = self.parts.bad_clips.all_gather_and_write()
        rates = self._rates(steps, elapsed)
        if self.metrics is not None:
            values |= {
                "lr": self._lr,
                "grad_norm": gradient_norm_after_step(self.parts.deepspeed, self._norm_before),
                "step_seconds": elapsed / max(steps, 1),
                "samples_per_second": more / elapsed,
                "memory_gib": peak_memory(self.device) / 2**30,
                "quarantined_clips": float(bad),
                "skipped_steps": float(self.parts.deepspeed.skipped_steps),
                "samples": float(samples),
                **rates,
            }
            self.metrics.log(self.iteration, values)

    def _rates(self, steps: int, elapsed: float) -> dict[str, float]:
        """Return tokens per second, utilization and the seconds of each phase, on rank zero; warn of slow ranks.

        Collective.
        """
        own = {phase: seconds / max(steps, 1) for phase, seconds in self.clock.seconds().items()}
        ranks = sgm.distributed.gather_objects((own, *self.work.take()))
        if ranks is None:
            return {}
        phases = [rank[0] for rank in ranks]
        warmed_up = self.iteration - steps > self.parts.point.iteration  # the first steps start workers and caches
        slow = slow_ranks(phases, elapsed / max(steps, 1), self.parts.plan.mesh.ranks) if warmed_up else ()
        for rank, phase, sentence in slow:
            if (rank, phase) not in self._told:
                self._told.add((rank, phase))
                logger.warning("%s", sentence)
        values = {f"{phase}_seconds": sum(rank[phase] for rank in phases) / len(phases) for phase in PHASES}
        values["tokens_per_second"] = sum(rank[1] for rank in ranks) / elapsed
        if self.work.peak is not None and all(rank[2] is not None for rank in ranks):
            values["mfu"] = sum(rank[2] for rank in ranks) / elapsed / (self.work.peak * len(ranks))
        return values

    def _evaluate(self) -> None:
        """Log the validation loss and sample the validation prompts, until a rank is asked to stop."""
        assert self.evaluation is not None
        started = time.perf_counter()
        logger.info(
            "evaluating after iteration %d: the loss of %d validation samples, then videos",
            self.iteration,
            self.evaluation.num_samples,
        )
        values: dict[str, float] = {}
        with evaluation_weights(self.parts.deepspeed):
            try:
                with self.parts.network_leaves() if any(self.parts.plan.caches.encodes.values()) else nullcontext():
                    values = self.evaluation.losses()
                if self.metrics is not None:
                    self.metrics.log(self.iteration, values, validation_set=self.evaluation.validation_set)
                with self.parts.network_leaves():
                    samples = self.evaluation.sample(self.iteration)
                self.summary.samples += samples
                if self.args.eval_measures:
                    figures = self.evaluation.measured(samples)
                    if self.metrics is not None and figures:
                        self.metrics.log(self.iteration, figures)
            except EvaluationStoppedError:
                self.summary.stopped = self._signal()
                warn_once(logger, [f"the evaluation after iteration {self.iteration} is left unfinished"])
        if values:
            self.saver.keep_if_best(self.iteration, values["validation_loss"])
            self.summary.best = self.saver.best
        self._logged_at += time.perf_counter() - started  # steps are timed without evaluation


class _NotFiniteError(RunError):
    """A loss, or too many gradients in a row, are not finite."""


def _hint(reason: str) -> str:
    """Return advice for a failure, chosen by keywords in its message."""
    text = reason.lower()
    if "not finite" in text or "overflow" in text:
        return (
            "look at these clips; lower deepspeed.optimizer.params.lr or deepspeed.gradient_clipping; train in the "
            "precision that the model YAML states"
        )
    if "out of memory" in text or "outofmemory" in text:
        return (
            "encode clips and captions ahead with tools/prepare_dataset.py, which spares VAE and text encoder; "
            "set args.checkpoint_activations=true, lower deepspeed.train_micro_batch_size_per_gpu (and raise "
            "gradient_accumulation_steps), use a higher ZeRO stage, or train with LoRA"
        )
    if any(word in text for word in ("connection", "timed out", "timeout", "peer", "nccl", "gloo")):
        return "another rank has ended or hangs: its own message says why; start again with args.resume=auto"
    return "start again with args.resume=auto once the cause is removed; --debug shows where it happened"
