"""The parts of a training run, made in the order that bounds memory and lets errors come early."""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

import sgm.distributed
from sgm.config.args import TrainingArgs
from sgm.config.load import Config
from sgm.config.precision import precision_name
from sgm.data.buckets.plan import BucketPlan
from sgm.data.loader import SampleStream, make_bucket_loader, make_loader
from sgm.data.order import TrainingOrder, derive_seed
from sgm.io import atomic_file, remove_leftovers
from sgm.log import get_logger, warn_once
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.training.batches import bucket_report, plan_buckets, require_same_plan, total_steps
from sgm.training.data import Data, usable_data
from sgm.training.optimizer import make_optimizer, undo_first_step
from sgm.training.prepare import Plan, total_iterations
from sgm.training.schedule import LearningRate
from sgm.training.state import ResumePoint, catch_up, load_state, lock_folder, numbers_digest, state_order
from sgm.training.step import TrainingModule, start_deepspeed
from sgm.training.trainable import Trainable, choose_trainable
from sgm.util import InputError, default, instantiate_from_config
from sgm.weights.adapters import AdapterInfo, describe_adapters
from sgm.weights.files import find_weights, weights_digest

logger = get_logger(__name__)

AUTO_WARMUP_ITERS = {"finetune": 100, "pretrain": 0}


@dataclass
class Parts:
    """What a run consists of.

    Attributes:
        args: the typed section.
        engine: the model; its network is what DeepSpeed trains.
        deepspeed: the DeepSpeed engine.
        schedule: of the learning rate.
        trainable: what is trained.
        adapters: description of the LoRA that is trained, None for other runs.
        loader: batches of this rank, from the first one not yet trained on; none where another rank reads for it.
        valid_data: validation clips, None without.
        num_clips: training clips, those left out included.
        known_bad: path → reason of training clips left out from the start.
        folder: of the run.
        lock: keeps other processes out of the folder while it is open; None but on rank zero.
        point: where the run begins or goes on.
        total_iters: optimizer steps of the whole run.
        micro_batch: samples in a forward pass of a rank, or of the ranks that share them.
        accumulation: forward passes of an optimizer step.
        global_batch: samples of an optimizer step, without buckets.
        zero_stage: ZeRO stage.
        buckets: which samples of which shape come when, None without buckets.
    """

    args: TrainingArgs
    engine: SATVideoDiffusionEngine
    deepspeed: Any
    schedule: LearningRate
    trainable: Trainable
    adapters: AdapterInfo | None
    loader: Iterable[dict[str, Any]]
    valid_data: Any
    num_clips: int
    known_bad: dict[str, str]
    folder: Path
    lock: IO[str] | None
    point: ResumePoint
    total_iters: int
    micro_batch: int
    accumulation: int
    global_batch: int
    zero_stage: int
    buckets: BucketPlan | None = None

    def micro_batches_before(self, iteration: int) -> int:
        """Return the micro-batches, of all ranks together, that buckets gave up to `iteration`."""
        return self.point.micro_batches + (iteration - self.point.iteration) * self.accumulation

    def samples_before(self, iteration: int) -> int:
        """Return the training samples seen after `iteration` optimizer steps."""
        if self.buckets is not None:
            return self.buckets.samples_before(self.micro_batches_before(iteration))
        return self.point.samples + (iteration - self.point.iteration) * self.global_batch


def build(config: Config, plan: Plan) -> Parts:
    """Make the parts of a run, and put it where `plan` says that it goes on.

    Raises:
        InputError: data, weights or resume state cannot be used.
    """
    args, section = plan.args, plan.deepspeed
    adapters = describe_adapters(config)
    point = _new_point(config, plan)
    if plan.resume is not None:
        plan.resume.check(point)
        point = plan.resume
    folder, lock = _run_folder(config, plan.resume)
    data, known_bad = usable_data(plan.data, args, folder, resumed=plan.resume is not None)
    total = total_iterations(args, data.num_train, plan.global_batch)  # an epoch has the clips that are left
    buckets = None
    if plan.division is not None:
        buckets, unreadable = plan_buckets(data, plan.division, args)
        known_bad |= unreadable
        if plan.resume is not None:
            require_same_plan(plan.resume, buckets, unreadable)
        point = replace(point, plan=buckets.digest)
        total = total_steps(buckets, args)
        logger.info("%s", bucket_report(buckets, args))
    engine = _load_engine(config, plan)
    trainable = choose_trainable(engine.network, config.model)
    logger.info("training %s", trainable)
    deepspeed = _start(config, plan, engine, total)
    # Ranks that share layers see the same tokens, and must drop the same of them.
    tokens_of = sgm.distributed.rank() // sgm.distributed.tensor_parallel_size()
    torch.manual_seed(derive_seed(args.seed, "dropout", tokens_of))
    if plan.resume is not None:
        load_state(deepspeed, plan.resume, with_rng=not (args.no_load_rng or args.no_save_rng))
        logger.info("going on with %s after iteration %d", folder, point.iteration)
    return Parts(
        args=args,
        engine=engine,
        deepspeed=deepspeed,
        schedule=deepspeed.lr_scheduler,
        trainable=trainable,
        adapters=adapters,
        loader=_loader(plan, data, point, total, buckets),
        valid_data=data.validation if data.valid else None,
        num_clips=plan.data.num_train,
        known_bad=known_bad,
        folder=folder,
        lock=lock,
        point=point,
        total_iters=total,
        micro_batch=section["train_micro_batch_size_per_gpu"],
        accumulation=section["gradient_accumulation_steps"],
        global_batch=plan.global_batch,
        zero_stage=section["zero_optimization"]["stage"],
        buckets=buckets,
    )


def _start(config: Config, plan: Plan, engine: SATVideoDiffusionEngine, total: int) -> Any:
    """Return the DeepSpeed engine, with optimizer and schedule, for the trained part of `engine`."""
    args, module = plan.args, TrainingModule(engine)
    optimizer = make_optimizer(config.deepspeed["optimizer"], module.named_parameters(), ema_decay=args.ema_decay)
    schedule = LearningRate(
        optimizer,
        train_iters=total,
        decay_style=args.lr_decay_style,
        decay_iters=args.lr_decay_iters,
        decay_ratio=args.lr_decay_ratio,
        warmup=args.warmup,
        auto_warmup_iters=default(args.auto_warmup_iters, AUTO_WARMUP_ITERS[args.mode]),
    )
    deepspeed = start_deepspeed(module, optimizer, schedule, plan.deepspeed)
    undo_first_step(deepspeed)
    return deepspeed


def _loader(
    plan: Plan, data: Data, point: ResumePoint, total: int, buckets: BucketPlan | None
) -> Iterable[dict[str, Any]]:
    """Return the batches of this rank from `point` to the end of the run, if it is the one that reads them."""
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
    )


def _new_point(config: Config, plan: Plan) -> ResumePoint:
    """Return the beginning of a run of this configuration."""
    args = plan.args
    return ResumePoint(
        run=Path(),
        iteration=0,
        samples=0,
        world_size=sgm.distributed.world_size(),
        tensor=plan.mesh.tensor,
        zero_stage=plan.deepspeed["zero_optimization"]["stage"],
        precision=precision_name(plan.dtype),
        optimizer=config.deepspeed["optimizer"]["type"],
        trained=plan.trainable.num_trained,
        ema=args.ema_decay is not None,
        base_digest=None if args.load is None else weights_digest(find_weights(args.load)),
        config_digest=numbers_digest(config),
        clips=plan.data.digest,
        order=state_order(plan.deepspeed["zero_optimization"]),
        buckets=None if plan.division is None else plan.division.digest,
    )


def _run_folder(config: Config, resume: ResumePoint | None) -> tuple[Path, IO[str] | None]:
    """Make the folder of a new run, or take that of a resumed one; lock it, and write the configuration into it."""
    args = config.args
    assert isinstance(args, TrainingArgs)
    found: Path | InputError | None = None
    lock = None
    if sgm.distributed.rank() == 0:
        try:
            found = resume.run if resume is not None else _make_folder(Path(args.save), args.experiment_name)
            lock = lock_folder(found)
            if resume is not None:
                for path in (found, *(path for path in found.iterdir() if path.is_dir())):
                    remove_leftovers(path)
                catch_up(resume)
            name = "config.yaml" if resume is None else f"config_from_{resume.iteration}.yaml"
            with atomic_file(found / name) as temporary:
                temporary.write_text(config.to_yaml(), encoding="utf-8")
        except InputError as error:
            found = error
    found = sgm.distributed.broadcast_from_rank_zero(found)
    if isinstance(found, InputError):
        raise found
    assert found is not None
    logger.info("run folder: %s", found)
    return found, lock


def _make_folder(save: Path, experiment: str) -> Path:
    """Make ``{save}/{experiment}-MM-DD-HH-MM``, with a number behind it where that is taken."""
    if not re.fullmatch(r"[^/\\\0]+", experiment) or experiment in (".", ".."):
        raise InputError(f"args.experiment_name '{experiment}' cannot be part of a folder's name; use letters and '-'")
    stem = f"{experiment}-{time.strftime('%m-%d-%H-%M')}"
    for number in range(1000):
        folder = save / (stem if number == 0 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"args.save: {folder} cannot be made: {error}; name another folder") from error
        return folder
    raise InputError(f"args.save: there are 1000 runs named {stem} already; wait a minute")


def _load_engine(config: Config, plan: Plan) -> SATVideoDiffusionEngine:
    """Build the model and read all its weights but those of the text encoder, which come with the first caption."""
    args, device = plan.args, sgm.distributed.device()
    # With ZeRO-3 no device needs to hold the whole network at any time.
    network_device = torch.device("cpu") if plan.deepspeed["zero_optimization"]["stage"] == 3 else device
    section = config.engine
    transformer = section["params"]["network_config"]["params"].setdefault("transformer_args", {})
    if args.checkpoint_activations is not None:
        transformer["checkpoint_activations"] = args.checkpoint_activations
    section["params"]["compile_model"] = bool(section["params"].get("compile_model")) or args.compile
    in_memory = args.load is None or args.force_train
    with torch.random.fork_rng():
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
            generator=torch.Generator().manual_seed(derive_seed(args.seed, "adapters")),
        )
        logger.info("%s", report)
        warn_once(logger, report.warnings)
    engine.run_device = device
    engine.network.ring_attention = args.ring_attention
    if plan.caches.vae:
        logger.info("%s", engine.load_first_stage(dtype=plan.dtype, device=device))
    elif engine.first_stage_model is not None:
        engine.first_stage_model.to("meta")
    if engine.conditioner is not None:
        engine.conditioner.to(device)
        for embedder in engine.conditioner.embedders:
            if plan.caches.text is not None:
                embedder.known, embedder.offload = plan.caches.text, args.text_encoder_offload
            else:
                # Captions come with every batch; reading the encoder anew for each would take longer than training.
                embedder.offload = "cpu" if args.text_encoder_offload == "cpu" else "none"
    return engine
