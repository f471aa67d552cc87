"""Sampling: videos from prompts.

The order limits memory: all prompts are encoded first and the text encoder is released, then the network is loaded,
then each prompt is sampled, decoded and written before the next one. While the text encoder works, a thread reads the
network's file into the host's page cache.
"""

import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

import sgm.distributed
from sgm.checks.estimate import memory_text
from sgm.checks.planner import room_on, with_preset
from sgm.checks.sampling import enable_memory_savers
from sgm.checks.sampling_plan import SamplingPlan, check_sampling
from sgm.config.load import Config
from sgm.config.precision import resolve_precision
from sgm.distributed import resolve_device
from sgm.inference.language.enhance import enhanced
from sgm.inference.prepare import make_folder, prepare
from sgm.inference.preview import Preview
from sgm.inference.progress import progress
from sgm.inference.prompts import (
    Prompt,
    assign_to_rank,
    check_words,
    image_size,
    load_image,
    read_prompts_cli,
)
from sgm.inference.record import Summary, Timings, clock, contents, later_settings, result_digest
from sgm.inference.results import Results, remove_unfinished
from sgm.inference.source_video import EncodedClips, check_whole, encode_clips, load_whole, start_size
from sgm.inference.video import contact_sheet, read_video, to_uint8, write_latents, write_video
from sgm.log import get_logger, is_rank_zero, warn_once
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.windows import led_in
from sgm.modules.geometry import Geometry
from sgm.parallel.attention import attention_named
from sgm.project import shipped
from sgm.util import RunError, default, instantiate_from_config, peak_memory
from sgm.weights.lora.several import stack_of
from sgm.weights.offload import Offload
from sgm.weights.read_ahead import reading_ahead

logger = get_logger(__name__)

Conds = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def sample(config: Config) -> Summary:
    """Check `config`, load the model, sample all prompts and write the results.

    Raises:
        InputError: wrong input; nearly always found before weights are read.
        RunError: sampling or writing failed; finished results are kept.
    """
    start = time.perf_counter()
    sgm.distributed.configure(config.args)
    prepared = prepare(config)
    config, prompts = prepared.config, prepared.prompts
    make_folder(Path(config.args.output_dir))
    if config.args.preview is not None:
        Path(config.args.preview).parent.mkdir(parents=True, exist_ok=True)
    sgm.distributed.initialize(mesh=prepared.mesh)
    if is_rank_zero():
        remove_unfinished(config.args.output_dir)
    if config.args.memory is not None:
        config = _with_preset(config, prepared.dtype)
    if prompts is not None and config.args.prompt_enhancer is not None:
        asked = prompts
        prompts = sgm.distributed.run_on_rank_zero(lambda: enhanced(config, asked, resolve_device(config.args)))
    run = SamplingRun(config)
    with logging_redirect_tqdm(loggers=[get_logger()]):
        run.sample_list(prompts) if prompts is not None else run.sample_typed()
    run.summary.seconds = time.perf_counter() - start
    run.summary.peak_bytes = peak_memory(run.device)
    return run.summary


def _with_preset(config: Config, dtype: torch.dtype) -> Config:
    """Choose the preset that fits on the device of every rank."""
    rooms = sgm.distributed.all_gather_objects(room_on(resolve_device(config.args)))
    room = min((room for room in rooms if room is not None), default=None)
    config, chosen = with_preset(config, dtype, room)
    logger.info("args.memory=auto, for %s: %s", _room_text(room), chosen)
    return config


def _room_text(room: float | None) -> str:
    return "a device that shares the host's memory" if room is None else f"{memory_text(room)} of the device"


class SamplingRun:
    """The model of one run and the results written so far.

    Args:
        config: checked by `prepare`, or the configuration of the training of `engine`.
        engine: a model in training. It is not loaded, moved, released or configured; the caller sets eval mode. None
            builds the model of `config` and loads it lazily.
        digest: recorded in the sidecars to identify the settings; None computes it from the files in ``args.load``.
        network_in_use: context in which the weights of the network of `engine` are on the device.
        between_steps: is called before each prompt and after each step of sampling, equally often on all ranks, also on
            those without a prompt; what it raises ends the run.
    """

    def __init__(
        self,
        config: Config,
        *,
        engine: SATVideoDiffusionEngine | None = None,
        digest: str | None = None,
        network_in_use: AbstractContextManager | None = None,
        between_steps: Callable[[], object] | None = None,
    ) -> None:
        self._between_steps = between_steps
        self.config = config
        self.args = config.args
        self.device = resolve_device(config.args)
        self.digest = result_digest(config) if digest is None else digest
        self.geometry = Geometry.from_network(config.model["network_config"]["params"])
        self.plan: SamplingPlan = check_sampling(config.args, self.geometry)
        if engine is None:
            self.dtype = resolve_precision(config.args, config.model.get("precision"), self.device.type)
            self.engine: Any = self._build()
        else:
            self.dtype = next(engine.network.parameters()).dtype
            self.engine = engine
        self.engine.windows = self.plan.windows
        self.engine.use_step_cache(self.args.step_cache, self.args.step_cache_threshold)
        suffix = ".safetensors" if self.args.only_save_latents else ".mp4"
        files = contents(config) if engine is None else {}  # the weights of a model in training are in no file yet
        self.results = Results(self.args, self._settings(), name=f"000000{suffix}", contents=files)
        self.summary = Summary()
        self._is_loaded = engine is not None
        self._network_in_use = default(network_in_use, nullcontext())
        shown = None if self.args.preview is None or not is_rank_zero() else Path(self.args.preview)
        self._preview = None if shown is None else Preview(shown, self.engine.decode_alone)
        self._uncond: dict[str, torch.Tensor] | None = None
        self._described: dict[str, torch.Tensor] | None = None  # the text of args.inversion
        self._clips: EncodedClips | None = None
        self._controls: dict[tuple[Any, ...], torch.Tensor] = {}  # the latents of the last control

    def _build(self) -> SATVideoDiffusionEngine:
        """Build the model on the meta device; the text encoder is assigned to the real one."""
        engine = instantiate_from_config(self.config.engine, allocate=False)
        engine.conditioner.to(self.device)
        offload = self.args.text_encoder_offload
        if self.args.asks_for_prompts and offload == "release":
            # Reloading the encoder for each prompt from the terminal would take longer than sampling.
            offload = "cpu"
        for embedder in engine.conditioner.embedders:
            embedder.offload, embedder.storage = offload, self.args.text_encoder_weights
        return engine

    def sample_list(self, prompts: list[Prompt], *, in_step: bool = False) -> None:
        """Sample every prompt of this data-parallel rank.

        Args:
            prompts: of all ranks, in the same order on each.
            in_step: run the same number of forward passes on all ranks, for parameters sharded over them (ZeRO-3).
                Finished prompts are sampled again; a rank without a prompt repeats one and writes nothing; a failure is
                raised after the last pass.
        """
        rank, size = sgm.distributed.data_parallel_rank(), sgm.distributed.data_parallel_size()
        mine = assign_to_rank(prompts, rank, size)
        if in_step:
            passes = [(prompt, list(range(self.args.batch_size))) for prompt in mine]
            if len(mine) < math.ceil(len(prompts) / size):
                passes.append((prompts[-1], []))
        else:
            passes = [(prompt, missing) for prompt in mine if (missing := self._missing(prompt))]
            # Ranks may see different results on disk.
            passes = sgm.distributed.broadcast_in_sample_group(passes)
        self._sample_all(passes, in_step=in_step)
        if self._between_steps is not None and len(passes) < math.ceil(len(prompts) / size):
            for _ in range(1 + len(self.engine.sampler.schedule(self.args.num_steps).timesteps)):
                self._between_steps()
        self._write_sheet(mine, rank, size)
        if size > 1:
            self.summary.scope = f"rank {rank} of {size}: "

    def _sample_all(self, passes: list[tuple[Prompt, list[int]]], *, in_step: bool) -> None:
        """Sample each (prompt, sample numbers); without numbers, sample once and write nothing."""
        if not passes:
            return
        with reading_ahead(self._not_yet_loaded()):
            encoded, seconds = self._encode([prompt for prompt, _ in passes])
        if not self._is_loaded and self.args.text_encoder_offload == "blocks":
            self.engine.conditioner.release()  # from the host's memory too: no prompt follows
        self._load()
        failure = None
        for (prompt, samples), conds in zip(progress(passes, "prompts", leave=True), encoded, strict=True):
            timings = Timings(text=seconds / len(passes))
            if self._between_steps is not None:
                self._between_steps()
            try:
                self._sample_prompt(prompt, samples, conds, timings)
            except RunError as error:
                if not in_step:
                    raise
                failure = default(failure, error)  # the other ranks are waiting in the next pass
        if failure is not None:
            raise failure

    def sample_typed(self) -> None:
        """Sample prompts from the terminal, one by one."""
        done = []
        control = self.geometry.control_channels > 0 and self.args.control is None
        for prompt in read_prompts_cli(image2video=self._asks_for_image, control=control, ready=self._ready):
            done.append(prompt)
            if missing := self._missing(prompt):
                with reading_ahead(self._not_yet_loaded()):
                    encoded, seconds = self._encode([prompt])
                self._load()
                self._sample_prompt(prompt, missing, encoded[0], Timings(text=seconds))
        self._write_sheet(done, 0, 1)

    @property
    def _asks_for_image(self) -> bool:
        return self.plan.image2video and self.args.start is None

    def _ready(self, prompt: Prompt) -> Prompt:
        """Return a typed prompt as it is sampled.

        Raises:
            InputError: the text encoder cannot read it.
        """
        if self.args.prompt_enhancer is not None:
            (prompt,) = enhanced(self.config, [prompt], self.device)
        if not self.args.allow_unknown_text:
            check_words([prompt], self.engine.conditioner)
        if self.args.control is not None:
            prompt = replace(prompt, control=Path(shipped(self.args.control)))
        if prompt.control is not None:
            check_whole(str(prompt.control), self.plan)
        return prompt

    def _not_yet_loaded(self) -> list[str]:
        """Return the network's checkpoints until it is loaded, on one rank of a machine: its page cache serves all."""
        if self._is_loaded or not sgm.distributed.is_first_of_machine():
            return []
        return [load for load in (self.args.load, self.args.base) if load is not None]

    def _load(self) -> None:
        if self._is_loaded:
            return
        args = self.args
        assert args.load is not None, "the dry run refuses a run without weights"
        waits = args.network_offload != "none"
        stack = stack_of(self.config)
        report = self.engine.load_weights(
            args.load,
            base=args.base,
            loras=stack,
            dtype=self.dtype,
            device=torch.device("cpu") if waits else self.device,
            storage=args.weights,
            storage_device=self.device,
            allow_missing_adapters=args.force_inference,
            generator=torch.Generator().manual_seed(args.seed),
        )
        logger.info("%s", report)
        for row in () if stack is None else stack.rows():
            logger.info("LoRA of %s", row)
        warn_once(logger, report.warnings)
        encodes = self.plan.image2video or args.encodes_clips or self.geometry.control_channels > 0
        if encodes or not args.only_save_latents:
            logger.info("%s", self.engine.load_first_stage(dtype=self.dtype, device=self.device))
            self._configure_vae(self.engine.first_stage_model)
        self.engine.network.ring_attention = args.ring_attention
        self.engine.network.attention = attention_named(default(args.attention, "auto"))
        if args.time_scaling is not None:
            self.engine.network.use_time_scaling(args.time_scaling)
        if waits:
            self._offload_network()
        self._is_loaded = True

    def _offload_network(self) -> None:
        """Let the network's weights wait in host memory; see `sgm.weights.offload`."""
        network = self.engine.network
        if self.device.type == "cpu":
            found = f"args.network_offload={self.args.network_offload} copies weights from memory to memory on a CPU"
            warn_once(logger, [f"{found}, and saves none"])
        self.engine.run_device = self.device
        blocks = network.blocks if self.args.network_offload == "blocks" else ()
        self._network_in_use = offload = Offload(network.requires_grad_(False), self.device, blocks)
        if blocks:
            network.use_blocks_within(offload.block)

    def _configure_vae(self, vae: Any) -> None:
        enable_memory_savers(vae, self.args)
        if hasattr(vae, "decodes_everywhere"):
            vae.decodes_everywhere = False

    def _settings(self) -> dict[str, Any]:
        """Return what decides every sample of this run, for its record."""
        args, sampler = self.args, self.engine.sampler
        return {
            "negative_prompt": default(args.negative_prompt, ""),
            "num_frames": self.plan.video_frames,
            "fps": self.plan.fps,
            "num_steps": default(args.num_steps, sampler.num_steps),
            "guidance_scale": default(args.guidance_scale, getattr(sampler.guider, "scale", None)),
            "precision": str(self.dtype).removeprefix("torch."),
            **later_settings(args),
            "config_digest": self.digest,
        }

    def _missing(self, prompt: Prompt) -> list[int]:
        """Return the sample numbers of `prompt` without a finished result of these settings."""
        missing = []
        for k in range(self.args.batch_size):
            path = self.results.finished(prompt, k) if self.args.skip_existing else None
            if path is not None:
                self.summary.skipped.append(path)
            else:
                self.results.announce(prompt, k)
                missing.append(k)
        return missing

    def _encode(self, prompts: list[Prompt]) -> tuple[list[Conds], float]:
        """Return (cond, uncond) embeddings of each prompt, on the CPU, and the seconds taken; uncond is shared."""
        start = clock()
        conditioner = self.engine.conditioner
        negative = default(self.args.negative_prompt, "")
        keys = [key for entry in conditioner.entries for key in entry.input_keys]
        encoded = []
        with conditioner.keep_loaded():
            for prompt in progress(prompts, "text encoder"):
                batch = {key: [prompt.text] for key in keys}
                if self._uncond is None:
                    both = conditioner.get_unconditional_conditioning(batch, {key: [negative] for key in keys})
                    cond, self._uncond = map(_on_cpu, both)
                    if self.args.inversion is not None:
                        self._described = _on_cpu(conditioner({key: [self.args.inversion] for key in keys}))
                else:
                    cond = _on_cpu(conditioner(batch))
                encoded.append((cond, self._uncond))
        return encoded, clock() - start

    def _sample_prompt(self, prompt: Prompt, samples: list[int], conds: Conds, timings: Timings) -> None:
        """Sample, decode and write the numbers `samples` of one prompt; without numbers, sample only."""
        drawn = samples or [0]
        cond, uncond = ({name: _repeat(value, drawn, self.device) for name, value in part.items()} for part in conds)
        size = self._size(prompt)
        clips = self._encoded_clips(size, timings)
        concat = self._image_condition(prompt, clips, len(drawn), timings)
        control = self._control(prompt, clips.size, timings)
        with self._network_in_use:
            latents = self._sample_latents(cond, uncond, clips, drawn, {"concat": concat, "control": control}, timings)
        if not samples:
            return
        if not torch.isfinite(latents).all():
            raise RunError(
                f"prompt {prompt.index}: the sampled latents are not finite (NaN or infinity); run the model in the "
                "precision that its YAML states, and check the checkpoint"
            )
        latents = sgm.distributed.broadcast_in_sample_group(latents)
        writes = sgm.distributed.sample_rank() == 0
        if not writes and sgm.distributed.context_parallel_size() == 1:
            return  # the first rank decodes alone
        if self.args.only_save_latents:
            saves = [lambda path, one=one: write_latents(path, one) for one in latents]
        else:
            start = clock()
            decoded = self.engine.decode_each(led_in(latents) if self.plan.loop else latents, to_uint8)
            videos = [clips.joined(frames[-self.plan.video_frames :]) for frames in decoded]
            timings.decode = clock() - start
            saves = [lambda path, frames=frames: write_video(path, frames, self.plan.fps) for frames in videos]
        failure = None
        for k, save in zip(samples, saves, strict=True) if writes else ():
            try:
                self._finish(prompt, k, save, size, timings)
            except RunError as error:
                failure = default(failure, error)  # the other samples of the batch are kept
        if failure is not None:
            raise failure

    def _size(self, prompt: Prompt) -> tuple[int, int]:
        """Return the size (H, W) in pixels of the results of a prompt."""
        if self.plan.size is not None:
            return self.plan.size
        first = start_size(self.args) if prompt.image is None else image_size(prompt.image)
        return self.geometry.size_for_image(*first)

    def _encoded_clips(self, size: tuple[int, int], timings: Timings) -> EncodedClips:
        """Return the clips of the run, encoded once for results of a size."""
        if self._clips is None or self._clips.size != size:
            start = clock()
            self._clips = encode_clips(self.args, self.plan, size, self.engine)
            timings.video = clock() - start
        return self._clips

    def _image_condition(self, prompt: Prompt, clips: EncodedClips, num: int, timings: Timings) -> torch.Tensor | None:
        """Return the image latents for `num` samples; None for text to video."""
        if not self.plan.image2video:
            return None
        start = clock()
        image = clips.image if prompt.image is None else load_image(prompt.image, clips.size)[None]
        assert image is not None, "the prompts of image to video have one"
        concat = self.engine.image_latents(image.to(self.device), self.plan.latents).expand(num, -1, -1, -1, -1)
        timings.image = clock() - start
        return concat

    def _control(self, prompt: Prompt, size: tuple[int, int], timings: Timings) -> torch.Tensor | None:
        """Return the latents (1, T, C, H, W) of the control of a prompt; those of the last one are kept."""
        if prompt.control is None:
            return None
        if (key := (prompt.control, self.results.content_now(prompt.control), size)) not in self._controls:
            start = clock()
            frames = load_whole(str(prompt.control), self.plan, size)[None]
            latents = self.engine.encode_first_stage(frames.to(self.device), sample=False)
            self._controls = {key: latents * default(self.args.control_strength, 1.0)}
            timings.control = clock() - start
        return self._controls[key]

    def _sample_latents(
        self,
        cond: Mapping[str, torch.Tensor],
        uncond: Mapping[str, torch.Tensor],
        clips: EncodedClips,
        samples: list[int],
        beside: Mapping[str, torch.Tensor | None],
        timings: Timings,
    ) -> torch.Tensor:
        start = clock()
        inputs = dict(clips.inputs)
        if self._described is not None:
            described = self._described.items()
            inputs["inversion"] = {name: _repeat(value, samples, self.device) for name, value in described}
        if self._preview is not None:
            self._preview.begin()
        if self._preview is not None or self._between_steps is not None:
            inputs["after_step"] = self._after_step
        latents = self.engine.sample(
            cond,
            uncond,
            shape=(self.plan.latents, self.geometry.out_channels, clips.size[0] // 8, clips.size[1] // 8),
            generators=[torch.Generator().manual_seed(self.args.seed + k) for k in samples],
            **beside,
            num_steps=self.args.num_steps,
            scale=self.args.guidance_scale,
            guidance_interval=self.args.guidance_interval,
            loop=self.plan.loop,
            progress=partial(progress, description="steps"),
            **inputs,
        )
        timings.sample = clock() - start
        return latents

    def _after_step(self, denoised: torch.Tensor) -> None:
        if self._preview is not None:
            self._preview(denoised)
        if self._between_steps is not None:
            self._between_steps()

    def _finish(
        self, prompt: Prompt, k: int, save: Callable[[Path], None], size: tuple[int, int], timings: Timings
    ) -> None:
        """Write sample `k` and its record."""
        record = {
            "height": size[0],
            "width": size[1],
            "load": self.args.load,
            "configs": list(self.config.bases),
            "overrides": list(self.config.overrides),
            "device": self.device.type,
            **({"original_prompt": prompt.original, "prompt_enhancer": prompt.enhancer} if prompt.original else {}),
            **self._cache_record(),
            "seconds": {name: round(value, 3) for name, value in vars(timings).items()},
            "peak_memory_bytes": peak_memory(self.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        path = self.results.write(prompt, k, save, record)
        self.summary.written.append(path)
        logger.info("wrote %s", path)

    def _cache_record(self) -> dict[str, Any]:
        """Return the share of the calls of blocks that a step cache let run, for the record of a sample."""
        cache = self.engine.step_cache
        return {} if cache is None else {"share_of_blocks_run": round(cache.share_run, 4)}

    def _write_sheet(self, prompts: list[Prompt], rank: int, size: int) -> None:
        """Write a contact sheet of all finished videos of `prompts`, including those of earlier runs."""
        if sgm.distributed.sample_rank() > 0:
            return
        if not self.args.contact_sheet or self.args.only_save_latents or not prompts:
            return
        samples = [
            (f"{prompt.index}. {prompt.title}, seed {self.args.seed + k}", self.results.finished(prompt, k))
            for prompt in prompts
            for k in range(self.args.batch_size)
        ]
        rows = ((caption, read_video(path)) for caption, path in samples if path is not None)
        name = "contact_sheet.png" if size == 1 else f"contact_sheet_rank{rank}.png"
        self.summary.sheet = Path(self.args.output_dir) / name
        contact_sheet(rows, self.summary.sheet)


def _on_cpu(cond: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in cond.items()}


def _repeat(value: torch.Tensor, samples: list[int], device: torch.device) -> torch.Tensor:
    """(1, ...) → (number of samples, ...) on `device`."""
    return value.to(device).expand(len(samples), *value.shape[1:])
