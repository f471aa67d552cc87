"""Check a training run before weights are read."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sgm.distributed
from sgm.checks.frozen import base_storage, device_problems, frozen_problems
from sgm.checks.mesh import check_mesh, mesh_of, restart_warnings, with_batch
from sgm.checks.planner import config_with, recomputed_blocks, room_on, training_rows
from sgm.checks.recomputation import kept_attention_problem
from sgm.checks.sampling import (
    as_table,
    check_abilities,
    check_files,
    check_memory_savers,
    check_sampler,
    check_shapes,
    cudnn_row,
    params_of,
    problems_of,
    schedule_problems,
    speed_problems,
    takes_control,
)
from sgm.checks.sampling_plan import SamplingPlan, check_sampling, scaling_warnings
from sgm.checks.scaling.cards import Card
from sgm.checks.scaling.recommend import STAGES, Planner, scaling_rows
from sgm.checks.training import check_training_data, fitted_buckets, geometry_of, longest_latents, pair_problems
from sgm.config.args import TrainingArgs
from sgm.config.deepspeed_section import engine_config, trains_adapters
from sgm.config.load import Config, ConfigError, Problem, digest_of
from sgm.config.precision import precision_name, resolve_training_precision
from sgm.data.buckets.assign import PATH as BUCKETS
from sgm.data.buckets.plan import Division
from sgm.data.rows import listed
from sgm.distributed import Mesh
from sgm.io import require_writable
from sgm.log import get_logger, warn_once
from sgm.training.bad_clips import clips_left_out, usable
from sgm.training.evaluate import validation_prompts
from sgm.training.inputs.caches import Caches, expected_caches, open_latents, open_text, reasons_to_load
from sgm.training.inputs.clips import Data, open_data
from sgm.training.metrics import import_wandb
from sgm.training.optim.optimizer import kind_of, make_optimizer, settings_of
from sgm.training.optim.schedule import endless_warmup, unfinished_decay
from sgm.training.optim.trainable import Trainable, choose_trainable
from sgm.training.sample_measures import check_measures
from sgm.training.start_point import check_resume, new_point
from sgm.training.state import ResumePoint, find_resume_point
from sgm.util import InputError, default, instantiate_from_config, without_allocating, without_compiler
from sgm.weights.adapters import describe_adapters, keep_alpha, with_adapters
from sgm.weights.files import find_weights
from sgm.weights.match import match_autoencoder, match_network
from sgm.weights.quantize import Storage, loss_text

logger = get_logger(__name__)

_NETWORK = "model.network_config.params"


@dataclass(frozen=True)
class Plan:
    """A training run that passed all checks.

    Attributes:
        config: the configuration, with the ``lora_config`` of the weights.
        args: its typed section.
        dtype: of the network.
        data: the clips.
        deepspeed: configuration of the DeepSpeed engine.
        mesh: the groups of ranks.
        division: of clips among buckets; None without buckets.
        caches: of encoded clips and captions.
        total_iters: optimizer steps of the whole run; None for epochs with buckets, whose samples are counted later.
        global_batch: samples of an optimizer step, without buckets.
        trainable: the trained parameters.
        optimizer_settings: all settings of the optimizer, defaults included.
        resume: state to resume from; None for a new run.
        base_storage: how frozen weights are stored; None keeps the precision of the run.
        rows: summary of the plan: name → text.
    """

    config: Config
    args: TrainingArgs
    dtype: torch.dtype
    data: Data
    deepspeed: Mapping[str, Any]
    mesh: Mesh
    division: Division | None
    caches: Caches
    total_iters: int | None
    global_batch: int
    trainable: Trainable
    optimizer_settings: dict[str, Any]
    resume: ResumePoint | None
    base_storage: Storage | None
    rows: Mapping[str, str]

    @property
    def is_complete(self) -> bool:
        """Whether the run that is resumed has all its iterations."""
        return self.resume is not None and self.total_iters is not None and self.resume.iteration >= self.total_iters

    def report(self, card: float | None = None, devices: Card | None = None, *, encoded: Config | None = None) -> str:
        """Return a summary of the plan with estimates of memory and traffic, which take seconds.

        Args:
            card: GiB of the card to plan for; None takes the accelerator, if there is one.
            devices: the card of each rank for which to recommend settings, and to predict the speed.
            encoded: the run with the caches that ``args.precompute`` makes first.
        """
        if encoded is not None:
            return as_table({**self.rows, **_rows_before_files(encoded, card, devices)})
        rows = _planned_rows(self.config, self.dtype, self.trainable, card, devices, **self.caches.encodes)
        return as_table({**self.rows, **rows})


def memory_report(config: Config, card: float | None, devices: Card | None = None) -> str:
    """Return the estimates of a run whose weights or clips are not there yet; arguments as of `Plan.report`."""
    return as_table(_rows_before_files(config, card, devices))


def _rows_before_files(config: Config, card: float | None, devices: Card | None) -> dict[str, str]:
    config = config_with(config)
    with without_allocating():
        trainable = choose_trainable(instantiate_from_config(config.model["network_config"]), config.model)
    dtype = resolve_training_precision(config, "")  # of any accelerator
    caches, rows = expected_caches(config)
    return {**rows, **_planned_rows(config, dtype, trainable, card, devices, **caches.encodes)}


def _planned_rows(
    config: Config,
    dtype: torch.dtype,
    trainable: Trainable,
    card: float | None,
    devices: Card | None,
    **loaded: Any,
) -> dict[str, str]:
    """Return the rows about memory and traffic, and about devices that are planned for."""
    rows = training_rows(config, dtype, trainable.names, card=card, **loaded)
    if devices is None:
        return rows
    legal = {"stages": _legal_stages(config), "divides": bool(_legal_stages(config, tensor=2))}
    planner = Planner(config, dtype, trainable.names, devices, **legal, **loaded)
    return rows | scaling_rows(planner)


def _legal_stages(config: Config, tensor: int = 1) -> list[int]:
    """Return the stages of ZeRO at which the optimizer works, with a tensor parallel size."""
    section, zero = config.deepspeed["optimizer"], config.deepspeed["zero_optimization"]

    def works(stage: int) -> bool:
        stand_in = [("weight", torch.nn.Parameter(torch.zeros(1, 1)))]
        make = partial(make_optimizer, section, stand_in, zero={**zero, "stage": stage}, tensor=tensor)
        return not problems_of("", "", make)

    return [stage for stage in STAGES if works(stage)]


def prepare(config: Config, *, check_clips: bool = False, for_card: bool = False) -> Plan:
    """Run all checks that need no weights and write no files.

    Args:
        config: of the run.
        check_clips: also check what the start of a run does later: the clips (``args.check_clips``), leaving out bad
            ones, and whether the state of a resumed run fits.
        for_card: allow the precisions of accelerators, also where this machine has none.

    Raises:
        ConfigError: all problems of configuration, checkpoint files, data and run folder.
    """
    config = with_adapters(config)
    checks = _Checks(config, for_card=for_card)
    checks.run()
    data = checks.facts.get("data")
    if check_clips and not checks.problems:
        checks.leave_out_clips()
    if checks.problems:
        # Several checks read the same files.
        once = {(problem.path, problem.found): problem for problem in reversed(checks.problems)}
        raise ConfigError(config.located(list(reversed(once.values()))))
    plan = checks.plan()
    if check_clips and plan.resume is not None:
        if plan.is_complete:
            plan.resume.require_weights()
        else:
            with_all_clips = replace(plan, data=data)
            check_resume(plan, new_point(with_all_clips, describe_adapters(plan.config)))
    return plan


def total_iterations(args: TrainingArgs, num_clips: int, global_batch: int, resume: ResumePoint | None = None) -> int:
    """Return the optimizer steps of the whole run, whose first ones may have had another batch."""
    if args.train_iters is not None:
        return args.train_iters
    assert args.epochs is not None, "the configuration is refused without either"
    done, samples = (0, 0) if resume is None else (resume.iteration, resume.samples)
    return done + max(0, math.ceil((args.epochs * num_clips - samples) / global_batch))


def other_batch(resume: ResumePoint, batch: int, *, micro: int, ranks: int) -> str | None:
    """Return what differs if iterations have another number of samples than before, and the settings that keep it.

    Args:
        resume: the state to resume from.
        batch: samples of an iteration now.
        micro: samples of a rank at a time.
        ranks: that read samples of their own.
    """
    mean, rest = divmod(resume.samples, max(resume.iteration, 1))  # states of earlier versions do not say it
    then = default(resume.global_batch, mean if rest == 0 else batch)
    if then in (0, batch):
        return None
    if then % (micro * ranks) == 0:
        cure = f"deepspeed.gradient_accumulation_steps={then // (micro * ranks)} keeps it"
    elif then % ranks == 0:
        cure = f"deepspeed.train_micro_batch_size_per_gpu={then // ranks} and gradient_accumulation_steps=1 keep it"
    else:
        cure = f"{ranks} ranks with samples of their own cannot keep it; a number that divides {then} can"
    return f"an iteration takes {batch} samples, and took {then} until iteration {resume.iteration}: {cure}"


def agree(plan: Plan) -> Plan:
    """Compare what every rank found by itself; return the plan with the resume point of rank zero.

    Collective: all ranks call it after `sgm.distributed.initialize`, before they create groups.

    Raises:
        InputError: a rank has another configuration, resume point, data or mesh than rank zero.
    """
    point = plan.resume
    own = {
        "the configuration": plan.config.digest[:12],
        "the resume point": "a new run" if point is None else f"{point.run} after iteration {point.iteration}",
        "its resume.json": digest_of(None if point is None else vars(point))[:12],
        "the clips": f"{plan.data} ({plan.data.digest[:12]})",
        "their captions": plan.data.captions_digest[:12],
        "the sizes of its parallel groups": str(plan.mesh),
    }
    # What all ranks found is gathered only if some differ: with a thousand, everyone would read a thousand answers.
    if sgm.distributed.any_rank(sgm.distributed.broadcast_from_rank_zero(own) != own):
        first, *others = sgm.distributed.all_gather_objects(own)
        differ = [
            f"  rank {rank} has {name} {other[name]}, and rank 0 has {first[name]}"
            for rank, other in enumerate(others, start=1)
            for name in own
            if other[name] != first[name]
        ]
        raise InputError(
            "the ranks do not agree:\n" + "\n".join(differ) + "\nstart all of them with the same command, the same "
            "files in the same places, and args.save on a file system that they share"
        )
    return replace(plan, resume=sgm.distributed.broadcast_from_rank_zero(point))


def with_recomputation(plan: Plan) -> Plan:
    """Return the plan with what ``args.checkpoint_activations: auto`` finds for the smallest device.

    Collective, like `agree`.
    """
    if plan.args.checkpoint_activations != "auto":
        return plan
    own = recomputed_blocks(
        plan.config,
        plan.dtype,
        plan.trainable.names,
        room_on(sgm.distributed.device()),
        **plan.caches.encodes,
    )
    most = torch.tensor([own[0], not own[1]], dtype=torch.float32, device=sgm.distributed.device())
    number, loses = map(int, sgm.distributed.all_reduce_(most, largest=True).tolist())
    keep = not loses
    depth = params_of(plan.config.model["network_config"])["num_layers"]
    beside = " without their attention" if number and keep else ""
    logger.info("args.checkpoint_activations=auto: %d of %d blocks are recomputed%s", number, depth, beside)
    return replace(plan, args=replace(plan.args, checkpoint_activations=number, keep_attention=keep))


def _plain(value: Any) -> Any:
    """Return a JSON value for a setting of an optimizer: a number for a tensor, text for what JSON has no value for."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    is_plain = value is None or isinstance(value, bool | int | str)
    return value if is_plain or (isinstance(value, float) and math.isfinite(value)) else str(value)


class _Checks:
    """Collect the checked settings of a run, and all problems."""

    def __init__(self, config: Config, *, for_card: bool) -> None:
        assert isinstance(config.args, TrainingArgs), "the configuration was loaded for training"
        self.config, self.args = config, config.args
        self.problems: list[Problem] = []
        self.facts: dict[str, Any] = {}
        self.mesh = mesh_of(config)
        self.data_ranks = max(1, sgm.distributed.world_size() // self.mesh.ranks)
        self.device_type = "" if for_card else sgm.distributed.device().type

    def record(self, name: str, path: str, work: Callable[[], Any]) -> None:
        """Store the result of `work` in `facts`, or its error as a problem at `path`."""
        cure = "correct it, in the file or on the command line"
        self.problems.extend(problems_of(path, cure, lambda: self.facts.update({name: work()})))

    def leave_out_clips(self) -> None:
        """Leave out the clips that a start would leave out."""
        point, data = self.facts["resume"], self.facts["data"]
        run = None if point is None else point.run
        self.record("left_out", "args.train_data", lambda: clips_left_out(data, self.args, run))
        if "left_out" in self.facts:
            self.record("data", "args.train_data", lambda: usable(data, self.args, self.facts["left_out"]))

    def run(self) -> None:
        """Run all checks."""
        self.record("resume", "args.resume", lambda: find_resume_point(self.args))
        self._keep_alpha()
        self._scale_rate()
        warn_once(logger, restart_warnings(self.config))
        self.config = with_batch(self.config)
        config, args, record = self.config, self.args, self.record
        self.problems += check_files(config)
        self._check_sections()
        self.problems += schedule_problems(config)
        record("geometry", _NETWORK, lambda: geometry_of(config))
        if geometry := self.facts.get("geometry"):
            self.problems += check_shapes(config, geometry)
            self.problems += check_training_data(config, geometry)
            record("buckets", BUCKETS, lambda: fitted_buckets(config, geometry))
            if "buckets" in self.facts and (longest := longest_latents(config, geometry)) is not None:
                warn_once(logger, scaling_warnings(args, geometry, longest))
            if args.eval_interval is not None:
                record("samples", "args", lambda: check_sampling(args, geometry))
        record("dtype", "model.precision", lambda: resolve_training_precision(config, self.device_type))
        self._check_mesh()
        if "dtype" in self.facts:
            dtype = self.facts["dtype"]
            if geometry:
                self.problems += speed_problems(config, geometry, sgm.distributed.device(), dtype)
            section = config.deepspeed
            record("deepspeed", "deepspeed", lambda: engine_config(section, world_size=self.data_ranks, dtype=dtype))
        record("optimizer", "deepspeed.optimizer", self._check_optimizer)
        if args.eval_interval is not None:
            record("prompts", "args.valid_prompts", lambda: validation_prompts(config))
            if args.eval_measures:
                record("measures", "args.eval_measures", lambda: check_measures(args))
        if args.wandb:
            record("wandb", "args.wandb", import_wandb)
        record("trainable", "model.network_config", self._check_network)
        if "trainable" in self.facts and "dtype" in self.facts:
            self.problems += pair_problems(config, trains_adapters=self.facts["trainable"].adapters)
            self.problems += frozen_problems(config, trains_adapters=self.facts["trainable"].adapters)
            self.problems += device_problems(config, self.facts["network"])
        record("adapters", "args.load", lambda: describe_adapters(config))
        record("vae", "model.first_stage_config", self._check_autoencoder)
        for part in ("denoiser_config", "loss_fn_config", "sampler_config"):
            if config.model.get(part) is not None:
                record(part, f"model.{part}", partial(instantiate_from_config, config.model[part]))
        if spread := getattr(getattr(self.facts.get("loss_fn_config"), "sigma_sampler", None), "bounds", None):
            path = "model.loss_fn_config.params.sigma_sampler_config.params.group_num"
            self.problems += problems_of(path, "correct it", partial(spread, 0, self.data_ranks))
        if args.eval_interval is not None and (sampler := self.facts.get("sampler_config")) is not None:
            self.problems += problems_of(
                "args", "correct it, for samples at evaluation", lambda: check_sampler(args, sampler)
            )
        record("data", "args.train_data", lambda: open_data(config))
        writable = partial(require_writable, args.save, f"{args.experiment_name}-00-00-00-00")
        self.problems += problems_of("args.save", "name another folder", writable)
        if not self.problems:
            self._open_caches()

    def _keep_alpha(self) -> None:
        """Take the alpha with which the adapters of a resumed run are trained, in place of that of a shipped file."""
        point: ResumePoint | None = self.facts.get("resume")
        if point is not None and trains_adapters(self.config.model):
            # Where neither state nor weights say it, an earlier version trained with the shipped file, so with 1.
            self.config = keep_alpha(self.config, default(point.alpha, 1), f"{point.run} trains with")

    def _scale_rate(self) -> None:
        """Multiply the learning rate by the number of ranks that read clips of their own (``args.scale_lr``)."""
        if not self.args.scale_lr or self.data_ranks == 1:
            return
        optimizer = self.config.deepspeed["optimizer"]
        params = optimizer["params"] | {"lr": optimizer["params"]["lr"] * self.data_ranks}
        section = self.config.deepspeed | {"optimizer": optimizer | {"params": params}}
        self.config = replace(self.config, deepspeed=section)

    def _check_sections(self) -> None:
        model, args = self.config.model, self.args
        needed = {"loss_fn_config": "to train", "conditioner_config": "to read captions"}
        if not model.get("latent_input"):
            needed["first_stage_config"] = "to encode clips (or set model.latent_input)"
        if args.eval_interval is not None:
            needed["sampler_config"] = "to sample at evaluation"
        for part, purpose in needed.items():
            if model.get(part) is None:
                cure = "take it from a shipped model configuration"
                self.problems.append(Problem(f"model.{part}", "", f"is missing, and is needed {purpose}", cure))
        if model.get("latent_input") and model.get("noised_image_input"):
            found = "is true, and image-to-video needs the first frame of each clip"
            self.problems.append(Problem("model.latent_input", "", found, "set model.latent_input=false"))
        elif model.get("latent_input") and self.config.data.get("target") == "data_video.SFTDataset":
            found = "is true, but data_video.SFTDataset gives videos"
            self.problems.append(Problem("model.latent_input", "", found, "set model.latent_input=false"))
        if model.get("latent_input") and takes_control(self.config):
            found = "is true, and a control is encoded as its clip is"
            self.problems.append(Problem("model.latent_input", "", found, "set model.latent_input=false"))
        transformer = params_of(model.get("network_config")).get("transformer_args") or {}
        if transformer.get("skip_init") and (args.load is None or args.force_train):
            path = "model.network_config.params.transformer_args.skip_init"
            found = "is true, and weights that no file holds would start from what is in memory"
            self.problems.append(Problem(path, "", found, "set it to false"))
        zero = self.config.deepspeed["zero_optimization"]
        if args.step_cache is not None and zero["stage"] == 3:
            found = f"is {args.step_cache}, and ZeRO stage 3 gathers the weights of a block on all ranks at once"
            cure = "remove it, or set deepspeed.zero_optimization.stage=2: ranks may skip other blocks"
            self.problems.append(Problem("args.step_cache", "", found, cure))
        offload = zero.get("offload_optimizer") or {}
        if args.async_save and offload.get("device") == "nvme":
            found = "is true, and DeepSpeed copies a state on NVMe itself, before training goes on"
            self.problems.append(Problem("args.async_save", "", found, "set args.async_save=false"))

    def _check_mesh(self) -> None:
        mesh, params, geometry = self.mesh, params_of(self.config.data), self.facts.get("geometry")
        size, frames = params.get("video_size"), params.get("max_num_frames")
        samples: SamplingPlan | None = self.facts.get("samples")
        patches = []
        shapes = [(frames, *size)] if size and frames else []
        if self.facts.get("buckets") is not None:
            shapes += [bucket.shape for bucket in self.facts["buckets"].buckets]
        if geometry:
            patches += [geometry.num_patches((F - 1) // geometry.time_compression + 1, (H, W)) for F, H, W in shapes]
        if geometry and samples is not None and samples.size is not None:
            patches.append(geometry.num_patches(samples.latents, samples.size))
        problems = check_mesh(self.config, num_patches=min(patches, default=None))
        stage = self.config.deepspeed["zero_optimization"]["stage"]
        if not problems and mesh.tensor > 1 and stage == 0 and self.facts.get("dtype") not in (None, torch.float32):
            found = "is 0: in 16 bits, DeepSpeed leaves tensor-parallel layers out of the norm that it clips by"
            cure = "set it to 1 or more, or args.model_parallel_size=1"
            problems.append(Problem("deepspeed.zero_optimization.stage", "", found, cure))
        if not problems and mesh.context > mesh.network:
            found = f"is {mesh.context}, but ranks that encode a clip together also train on it together"
            cure = f"set it to 1, or args.sequence_parallel_size={mesh.context}"
            problems.append(Problem("model.first_stage_config.params.cp_size", "", found, cure))
        self.problems += problems

    def _check_network(self) -> Trainable:
        """Build the network on the meta device, check the names in its weights, and find the trained parameters."""
        args = self.args
        with without_allocating():
            network = instantiate_from_config(self.config.model["network_config"])
        check_abilities(self.config, network)
        self._check_activations(network)
        if args.load is not None and not problems_of("", "", partial(find_weights, args.load)):
            match_network(network, args.load, base=args.base, allow_missing=args.force_train)
        self.facts["network"] = network
        return choose_trainable(network, self.config.model)

    def _check_activations(self, network: Any) -> None:
        number, depth = self.args.checkpoint_activations, params_of(self.config.model["network_config"])["num_layers"]
        if isinstance(number, int) and number > depth:
            found = f"is {number}, and the network has {depth} blocks"
            raise ConfigError([Problem("args.checkpoint_activations", "", found, "give fewer, or true for all")])
        if self.args.offload_activations and not hasattr(network, "offload_activations"):
            found = f"is true, but {type(network).__name__} has no method offload_activations"
            raise ConfigError([Problem("args.offload_activations", "", found, "remove it, or add that method")])
        if self.args.keep_attention and (problem := kept_attention_problem(self.config)) is not None:
            raise ConfigError([problem])

    def _check_optimizer(self) -> dict[str, Any]:
        section, zero = self.config.deepspeed["optimizer"], self.config.deepspeed["zero_optimization"]
        stand_in = [("weight", torch.nn.Parameter(torch.zeros(1, 1)))]
        if not trains_adapters(self.config.model):
            stand_in.append(("bias", torch.nn.Parameter(torch.zeros(1))))
        kind = kind_of(section["type"])  # before: torchao's module imports torch's compiler
        with without_compiler():
            given = {"ema_decay": self.args.ema_decay, "zero": zero, "tensor": self.mesh.tensor}
            optimizer = make_optimizer(section, stand_in, **given)
        if kind.own_rate and self.args.lr_decay_style != "constant":
            found = f"is {self.args.lr_decay_style}, and {section['type']} finds or averages its rate over the run"
            raise ConfigError([Problem("args.lr_decay_style", "", found, "set args.lr_decay_style=constant")])
        if section["type"].startswith("prodigyopt.") and self.args.scale_lr:
            found = f"is true, and {section['type']} finds its rate by itself"
            raise ConfigError([Problem("args.scale_lr", "", found, "set args.scale_lr=false")])
        return json.loads(json.dumps({name: _plain(optimizer.defaults[name]) for name in settings_of(optimizer)}))

    def _check_autoencoder(self) -> None:
        section = self.config.model.get("first_stage_config")
        if section is None:
            return
        with without_allocating():
            vae = instantiate_from_config(section)
        check_memory_savers(self.config, vae)
        if Path(str(vae.ckpt_path)).is_file():
            match_autoencoder(vae, vae.ckpt_path, ignore_keys=vae.ignore_keys)

    def _open_caches(self) -> None:
        """Open the caches, and read training clips from them."""
        config, record, facts = self.config, self.record, self.facts
        record("latents", "args.latent_cache", lambda: open_latents(config, facts["data"], facts["dtype"]))
        record("text", "args.text_cache", lambda: open_text(config, facts["data"]))
        if not self.problems:
            facts["data"], latents, images = facts["latents"]
            prompts = [prompt.text for prompt in facts.get("prompts") or ()]
            reasons = reasons_to_load(config, facts["data"], images, facts["text"], prompts)
            facts["caches"] = found = Caches(latents, images, facts["text"], **reasons)
            if self.args.network_offload == "cpu" and not (found.vae or found.text_encoder):
                text = "args.network_offload=cpu has no effect: neither VAE nor T5 is loaded, so the network stays"
                warn_once(logger, [text])

    def _division(self) -> Division | None:
        section = self.config.deepspeed
        if self.facts["buckets"] is None:
            return None
        return Division(
            buckets=self.facts["buckets"],
            ranks=self.data_ranks,
            micro_batch=section["train_micro_batch_size_per_gpu"],
            accumulation=section["gradient_accumulation_steps"],
            drop_partial=bool(params_of(self.config.data).get("drop_partial")),
        )

    def plan(self) -> Plan:
        """Return the plan, after checks without problems."""
        args, facts, section = self.args, self.facts, self.config.deepspeed
        micro, accumulation = section["train_micro_batch_size_per_gpu"], section["gradient_accumulation_steps"]
        batch = micro * accumulation * self.data_ranks
        size = self.mesh.ranks
        ranks = f"{self.data_ranks} " + ("ranks" if size == 1 else f"groups of {size} ranks that share clips")
        data: Data = facts["data"]
        left_out = [f"{path}: {reason}" for path, reason in sorted(facts.get("left_out", {}).items())]
        resume: ResumePoint | None = facts["resume"]
        total = total_iterations(args, data.num_train, batch, resume)
        batches = f"{micro} clips x {accumulation} steps of accumulation x {ranks} = {batch}"
        length = f"{total} iterations = {total * batch / data.num_train:.1f} epochs"
        division = self._division()
        if division is None and batch > data.num_train:
            logger.warning("an iteration takes %d clips, and there are %d: each is repeated", batch, data.num_train)
        if division is not None:
            batches = f"{len(division.batch_sizes)} buckets, {accumulation} steps of accumulation, {ranks}"
            total = args.train_iters
            length = f"{args.epochs} epochs" if total is None else f"{total} iterations"
        elif resume is not None and (change := other_batch(resume, batch, micro=micro, ranks=self.data_ranks)):
            logger.warning("%s", change)
        if total is not None and (said := endless_warmup(args, total) or unfinished_decay(args, total)):
            logger.warning("%s", said)
        rows = {
            "configuration": f"{' + '.join(self.config.bases)} (digest {self.config.digest[:12]})",
            "weights": "random" if args.load is None else str(find_weights(args.load)),
            "trains": str(facts["trainable"]),
            "precision": f"{precision_name(facts['dtype'])} on {sgm.distributed.device()}",
            **({} if (storage := base_storage(self.config)) is None else {"frozen weights": loss_text(storage)}),
            **cudnn_row(facts["dtype"], sgm.distributed.device()),
            "data": str(data),
            **data.afar_rows(),
            **({"left out": listed(left_out).strip()} if left_out else {}),
            **facts["caches"].report(),
            "batch": batches,
            "length": length,
            "optimizer": f"{section['optimizer']['type']}, learning rate {section['optimizer']['params']['lr']:g} "
            f"({args.lr_decay_style}), ZeRO stage {section['zero_optimization']['stage']}",
            "results": args.save if resume is None else f"{resume.run}, from iteration {resume.iteration}",
        }
        return Plan(
            config=self.config,
            args=args,
            dtype=facts["dtype"],
            data=data,
            deepspeed=facts["deepspeed"],
            mesh=self.mesh,
            division=division,
            caches=facts["caches"],
            total_iters=total,
            global_batch=batch,
            trainable=facts["trainable"],
            optimizer_settings=facts["optimizer"],
            resume=resume,
            base_storage=storage,
            rows=rows,
        )
