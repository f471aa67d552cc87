"""Build the parts of a training run, in an order that limits memory and finds errors early."""

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

import sgm.distributed
from sgm.config.args import TrainingArgs
from sgm.config.load import Config
from sgm.config.precision import autoencoder_dtype, conv3d_warnings
from sgm.data.buckets.plan import BucketPlan
from sgm.data.loader import SampleStream, make_bucket_loader, make_loader
from sgm.data.order import TrainingOrder, derive_seed
from sgm.io import atomic_file, hidden_folder, lock_folder, remove_leftovers
from sgm.log import get_logger, warn_once
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.parallel.attention import attention_named
from sgm.training.bad_clips import BadClips, usable_data
from sgm.training.inputs.buckets import bucket_report, plan_buckets, require_same_plan, total_steps
from sgm.training.inputs.clips import Data
from sgm.training.optim.optimizer import discard_initial_update, group_values, make_optimizer
from sgm.training.optim.schedule import LearningRate, factors_of
from sgm.training.optim.trainable import choose_trainable
from sgm.training.prepare import Plan, total_iterations
from sgm.training.start_point import check_resume, new_point
from sgm.training.state import (
    FOLDER,
    ResumePoint,
    abandoned_run,
    load_state,
    repair_latest,
    require_files,
)
from sgm.training.step import TrainingModule, start_deepspeed
from sgm.util import InputError, default, instantiate_from_config
from sgm.weights.adapters import AdapterInfo, describe_adapters
from sgm.weights.offload import Offload, without_frozen
from sgm.weights.quantize import loss_text

logger = get_logger(__name__)


@dataclass
class Parts:
    """The parts of a run.

    Attributes:
        plan: the checked configuration.
        engine: the model.
        deepspeed: the DeepSpeed engine, which trains the model's network.
        adapters: description of the trained LoRA; None for other runs.
        loader: remaining batches of this rank; empty unless it is the first of its sample's group.
        valid_data: validation clips or None.
        valid_inputs: the same for the loss, from a cache where it holds them.
        bad_clips: clips left out or replaced.
        folder: of the run.
        lock: on rank zero, locks the folder while it is open.
        point: start or resume state of the run.
        total_iters: optimizer steps of the whole run.
        offload: of the network's frozen weights; None if they do not wait in host memory.
        epoch_samples: samples of an epoch without buckets.
        buckets: samples and shapes of the micro-batches; None without buckets.
    """

    plan: Plan
    engine: SATVideoDiffusionEngine
    deepspeed: Any
    adapters: AdapterInfo | None
    loader: Iterable[dict[str, Any]]
    valid_data: Any
    valid_inputs: Any
    bad_clips: BadClips
    folder: Path
    lock: IO[str] | None
    point: ResumePoint
    total_iters: int
    offload: Offload | None
    epoch_samples: int
    buckets: BucketPlan | None = None

    @property
    def network_in_use(self) -> AbstractContextManager:
        """Context in which all weights of the network are there; see ``args.network_offload``."""
        return default(self.offload, nullcontext())

    def network_leaves(self) -> AbstractContextManager:
        """Return a context in which others need the room, so that the network leaves after each use."""
        return nullcontext() if self.offload is None else self.offload.leaving()

    def micro_batches_before(self, iteration: int) -> int:
        """Return the number of micro-batches, counted once for all ranks, up to the end of `iteration`."""
        steps = iteration - self.point.iteration
        return self.point.micro_batches + steps * self.deepspeed.gradient_accumulation_steps()

    def samples_before(self, iteration: int) -> int:
        """Return the number of training samples after `iteration` optimizer steps."""
        if self.buckets is not None:
            return self.buckets.samples_before(self.micro_batches_before(iteration))
        return self.point.samples + (iteration - self.point.iteration) * self.plan.global_batch

    def epochs_before(self, iteration: int) -> int:
        """Return the number of whole epochs after `iteration` optimizer steps."""
        if self.buckets is not None:
            return self.buckets.epochs_before(self.micro_batches_before(iteration))
        return self.samples_before(iteration) // self.epoch_samples


def build(config: Config, plan: Plan) -> Parts:
    """Build the parts of a run, and load the resume state of `plan`.

    Raises:
        InputError: data, weights or resume state cannot be used.
    """
    args, adapters = plan.args, describe_adapters(config)
    point = now = new_point(plan, adapters)
    if plan.resume is not None:
        check_resume(plan, now)
        changed = ("optimizer_settings", "lora_rank", "lora_alpha", "lora_kind", "start_number")
        changed += ("world_size", "tensor", "trained", "trained_names", "order", "global_batch")
        point = replace(plan.resume, **{name: getattr(now, name) for name in changed})
    with ExitStack() as hidden, ExitStack() as unlocking:
        folder, lock = _open_folder(config, plan.resume, hidden)
        if lock is not None:
            unlocking.callback(lock.close)
        if plan.resume is not None:
            require_files(plan.resume, now, with_rng=args.restores_rng)
        data, bad_clips = usable_data(plan.data, args, folder, resumed=plan.resume is not None)
        total, buckets = _length(plan, data, bad_clips)
        if buckets is not None:
            point = replace(point, plan=buckets.digest)
        engine = _load_engine(config, plan)
        logger.info("training %s", choose_trainable(engine.network, config.model))
        with without_frozen(engine.network) if plan.base_storage or _leaves(plan) else nullcontext():
            deepspeed = _start(config, plan, engine, total)
        offload = _offload_network(plan, engine)
        # For what a network of the user's own draws, such as dropout: tensor parallel ranks have the same tokens.
        group = sgm.distributed.rank() // sgm.distributed.tensor_parallel_size()
        torch.manual_seed(derive_seed(args.seed, "dropout", group))
        if plan.resume is not None:
            _load(plan.resume, now, args, engine, deepspeed)
            logger.info("resuming %s after iteration %d", folder, point.iteration)
        else:
            folder = bad_clips.folder = sgm.distributed.run_on_rank_zero(partial(_publish, folder, args))
        logger.info("run folder: %s", folder)
        unlocking.pop_all()  # only a start that fails unlocks the folder here
    encodes_clips = plan.caches.encodes["vae"] and not engine.latent_input
    clip_dtype = engine.first_stage_dtype if encodes_clips else None  # the autoencoder would convert them
    return Parts(
        plan=plan,
        engine=engine,
        deepspeed=deepspeed,
        adapters=adapters,
        loader=_loader(plan, data, point, total, buckets, clip_dtype=clip_dtype),
        valid_data=data.validation,
        valid_inputs=data.validation_inputs,
        bad_clips=bad_clips,
        folder=folder,
        lock=lock,
        point=point,
        total_iters=total,
        offload=offload,
        epoch_samples=data.num_train,
        buckets=buckets,
    )


def _load(
    resume: ResumePoint, now: ResumePoint, args: TrainingArgs, engine: SATVideoDiffusionEngine, deepspeed: Any
) -> None:
    """Load the resume state into the parts of the run `now`. Collective."""
    load_state(deepspeed, resume, now, with_rng=args.restores_rng)
    moments = getattr(engine.require_loss().sigma_sampler, "moments", None)
    if moments is not None and resume.timesteps is not None:
        moments.load_state(resume.timesteps)


def _offload_network(plan: Plan, engine: SATVideoDiffusionEngine) -> Offload | None:
    """Let the frozen weights wait in host memory; as a whole, only where something else is on the device meanwhile."""
    network: Any = engine.network
    if not _leaves(plan):
        return None
    if plan.args.network_offload == "cpu":
        return Offload(network, engine.device, stays=not plan.caches.in_step)
    found = Offload(network, engine.device, network.blocks, backward=True)
    network.use_blocks_within(found.block)
    return found


def _leaves(plan: Plan) -> bool:
    """Whether frozen weights wait in host memory; as a whole, only if text encoder or VAE run meanwhile."""
    others = bool(plan.caches.vae or plan.caches.text_encoder)
    return plan.args.network_offload == "blocks" or (plan.args.network_offload == "cpu" and others)


def _start(config: Config, plan: Plan, engine: SATVideoDiffusionEngine, total: int) -> Any:
    """Return the DeepSpeed engine, with optimizer and schedule, for the network of `engine`."""
    args, module = plan.args, TrainingModule(engine)
    optimizer = make_optimizer(
        config.deepspeed["optimizer"],
        module.named_parameters(),
        ema_decay=args.ema_decay,
        zero=config.deepspeed["zero_optimization"],
    )
    schedule = LearningRate(optimizer, factors_of(args, total))
    initial = group_values(optimizer)
    deepspeed = start_deepspeed(module, optimizer, schedule, plan.deepspeed)
    discard_initial_update(deepspeed, initial)
    return deepspeed


def _length(plan: Plan, data: Data, bad_clips: BadClips) -> tuple[int, BucketPlan | None]:
    """Return the optimizer steps of the whole run, which excluded clips shorten, and its buckets.

    Raises:
        InputError: the buckets differ from those of the run that goes on, or it has all steps and no weights.
    """
    args, resume, buckets = plan.args, plan.resume, None
    if plan.division is None:
        total = total_iterations(args, data.num_train, plan.global_batch, resume)
    else:
        buckets, unreadable = plan_buckets(data, plan.division, args)
        bad_clips.add(unreadable.items())
        if resume is not None:
            require_same_plan(resume, buckets, unreadable)
        total = total_steps(buckets, args, resume)
        logger.info("%s", bucket_report(buckets, args, resume))
    if resume is not None and resume.iteration >= total:
        resume.require_weights()  # `_open_folder` has repaired ``latest``
    return total, buckets


def _loader(
    plan: Plan,
    data: Data,
    point: ResumePoint,
    total: int,
    buckets: BucketPlan | None,
    *,
    clip_dtype: torch.dtype | None,
) -> Iterable[dict[str, Any]]:
    """Return the batches of this rank from `point` to the end; empty unless it is the first rank of its group."""
    if sgm.distributed.sample_rank() > 0:
        return ()
    args, rank = plan.args, sgm.distributed.data_parallel_rank()
    if buckets is not None:
        steps = (total - point.iteration) * buckets.division.accumulation
        return make_bucket_loader(
            SampleStream(data.train, buckets.order, buckets),
            first=point.micro_batches,
            stop=point.micro_batches + steps,
            rank=rank,
            num_workers=args.num_workers,
            prefetch_factor=args.prefetch_factor,
            clip_dtype=clip_dtype,
        )
    sizes = [len(dataset) for dataset in data.train]
    order = TrainingOrder(sizes, seed=args.seed, weights=args.train_data_weights)
    return make_loader(
        SampleStream(data.train, order),
        first=point.samples,
        stop=point.samples + (total - point.iteration) * plan.global_batch,
        rank=rank,
        world=sgm.distributed.data_parallel_size(),
        micro_batch=plan.deepspeed["train_micro_batch_size_per_gpu"],
        num_workers=args.num_workers,
        prefetch_factor=args.prefetch_factor,
        clip_dtype=clip_dtype,
    )


def _open_folder(config: Config, resume: ResumePoint | None, hidden: ExitStack) -> tuple[Path, IO[str] | None]:
    """Return the locked run folder with the configuration in it: the resumed one, or a new one, removed with `hidden`.

    A new one is hidden until `_publish`, so that a start that is refused or killed leaves no run.
    """
    args = config.args
    assert isinstance(args, TrainingArgs)
    lock = None

    def open_folder() -> Path:
        nonlocal lock
        folder = resume.run if resume is not None else hidden.enter_context(_hidden_run(args))
        lock = lock_folder(folder, cure="use args.resume=none to start a new run")
        if resume is not None:
            for path in (folder, folder / FOLDER, *(path for path in folder.glob("*/") if not path.is_symlink())):
                remove_leftovers(path)
            repair_latest(resume)
        name = "config.yaml" if resume is None else f"config_from_{resume.iteration}.yaml"
        with atomic_file(folder / name) as temporary:
            temporary.write_text(config.to_yaml(), encoding="utf-8")
        return folder

    return sgm.distributed.run_on_rank_zero(open_folder), lock


@contextmanager
def _hidden_run(args: TrainingArgs) -> Iterator[Path]:
    remove_leftovers(Path(args.save))
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(hidden_folder(Path(args.save) / args.experiment_name))
        except OSError as error:
            raise InputError(f"args.save: no folder can be made in {args.save}: {error}; name another one") from error
        yield folder


def _publish(hidden: Path, args: TrainingArgs) -> Path:
    """Give the hidden folder of a new run its name, and return that.

    With ``args.resume=auto`` it takes the place of a run whose process died before its first save; otherwise it is
    ``{save}/{experiment}-MM-DD-HH-MM``, with a number appended if that exists.
    """
    if args.resume == "auto" and (abandoned := abandoned_run(args)) is not None:
        folder, lock = abandoned
        logger.info("%s ended before its first save, and starts again", folder)
        with lock:
            shutil.rmtree(folder)
            return hidden.rename(folder)
    stem = f"{args.experiment_name}-{time.strftime('%m-%d-%H-%M')}"
    for number in range(1000):
        folder = Path(args.save) / (stem if number == 0 else f"{stem}-{number}")
        if not folder.exists():
            try:
                return hidden.rename(folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    raise InputError(f"args.save: there are 1000 runs named {stem} already; wait a minute")


def _load_engine(config: Config, plan: Plan) -> SATVideoDiffusionEngine:
    """Build the model and load its weights; the text encoder loads lazily, at the first caption."""
    args, device = plan.args, sgm.distributed.device()
    # With ZeRO-3 the device only holds shards of the network.
    is_sharded = plan.deepspeed["zero_optimization"]["stage"] == 3
    network_device = torch.device("cpu") if is_sharded or _leaves(plan) else device
    section = config.engine
    transformer = section["params"]["network_config"]["params"].setdefault("transformer_args", {})
    if args.checkpoint_activations is not None:
        transformer["checkpoint_activations"] = args.checkpoint_activations
    in_memory = args.load is None or args.force_train
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU
        torch.manual_seed(derive_seed(args.seed, "weights"))
        engine: SATVideoDiffusionEngine = instantiate_from_config(section, allocate=in_memory)
    if args.load is None:
        engine.network.to(device=network_device, dtype=plan.dtype)
    else:
        report = engine.load_weights(
            args.load,
            base=args.base,
            dtype=plan.dtype,
            device=network_device,
            allow_missing=args.force_train,
            storage=plan.base_storage,
            storage_device=device,
            generator=torch.Generator().manual_seed(derive_seed(args.seed, "adapters")),
        )
        logger.info("%s", report)
        if plan.base_storage is not None:
            logger.info("frozen weights in %s", loss_text(plan.base_storage))
        warn_once(logger, report.warnings)
    engine.run_device = device
    engine.network.ring_attention = args.ring_attention
    engine.network.attention = attention_named(default(args.attention, "auto"))
    if args.time_scaling is not None:
        engine.network.use_time_scaling(args.time_scaling)
    if args.keep_attention:
        engine.network.keep_attention()
    if args.offload_activations:
        engine.network.offload_activations(device, torch.device("cpu"))
    if plan.caches.vae:
        place = torch.device("cpu") if plan.caches.vae_waits else device
        if plan.caches.vae_waits:  # it decodes on the device
            warn_once(logger, conv3d_warnings(autoencoder_dtype(plan.dtype), device))
        logger.info("%s", engine.load_first_stage(dtype=plan.dtype, device=place))
    elif engine.first_stage_model is not None:
        engine.first_stage_model.to("meta")
    if engine.conditioner is not None:
        engine.conditioner.to(device)
        for embedder in engine.conditioner.embedders:
            if plan.caches.text is not None:
                embedder.known, embedder.offload = plan.caches.text, args.text_encoder_offload
            else:
                # Every batch has captions, so the encoder is never released.
                embedder.offload = "none" if args.text_encoder_offload == "release" else args.text_encoder_offload
    return engine
