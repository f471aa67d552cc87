"""The typed ``args`` section of a run: `SamplingArgs`, and `TrainingArgs`, which adds the keys of training.

Training includes the keys of sampling, since it samples at evaluation. `sgm.config.load` reads the section into these
classes and checks values against their annotations.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from sgm.config.refused import REFUSED
from sgm.config.values import AtLeast0, AtLeast1, Name, Positive, Share, Width, spelled
from sgm.urls import is_url, url_problem

_MAX_SEED = 2**63 - 1  # a signed 64-bit integer, for torch's generators

PICTURES = (".jpg", ".png", ".webp")  # kinds of a preview

_Batch = Annotated[int, Field(ge=1, le=10_000)]
# Between evaluations or checkpoints.
Interval = AtLeast1 | Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5} epochs?$", description="text such as '2 epochs'")]
_Workers = Annotated[int, Field(ge=0, le=1024)]
_Strength = Annotated[float, Field(ge=-100, le=100)]


class LoraArgs(BaseModel):
    """An entry of ``args.loras``; docs/adapters.md explains its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Name
    strength: _Strength | dict[str, _Strength] = 1.0
    schedule: Annotated[tuple[tuple[Share, _Strength], ...], Field(min_length=1)] | None = None
    alpha: Positive | None = None
    any_base: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingArgs:
    """The ``args`` section of a sampling run; docs/configuration.md explains every key. Null: the model's value."""

    # Weights
    mode: Literal["inference", "finetune", "pretrain"] = "inference"
    load: Name | None = None
    base: Name | None = None
    loras: tuple[LoraArgs, ...] = ()
    force_inference: bool = False
    # Prompts
    prompt: Name | None = None
    image: Name | None = None
    video: Name | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    mask: Name | None = None
    inversion: Name | None = None
    start: Name | None = None
    end: Name | None = None
    held_frames: Annotated[int, Field(ge=5, le=10_000)] | None = None
    control: Name | None = None
    control_strength: Annotated[float, Field(ge=0, le=10)] | None = None
    input_type: Literal["txt", "cli"] = "cli"
    input_file: Name | None = None
    image2video: bool | None = None
    negative_prompt: str | None = None
    allow_unknown_text: bool = False
    prompt_enhancer: Name | None = None
    prompt_enhancer_model: Name | None = None
    prompt_enhancer_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    # Size: pixels (height, width), latent frames, frames per second of the file
    sampling_image_size: tuple[Width, Width] | None = None
    sampling_num_frames: AtLeast1 | None = None
    sampling_fps: Annotated[int, Field(ge=1, le=1000)] = 8
    time_scaling: Literal["riflex", "interpolate", "ntk", "extrapolate"] | None = None
    time_window: AtLeast1 | None = None
    time_window_overlap: AtLeast1 | None = None
    loop: bool = False
    latent_channels: AtLeast1 | None = None
    # Sampling
    num_steps: AtLeast1 | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    batch_size: _Batch = 1
    guidance_interval: tuple[Share, Share] | None = None
    step_cache: Literal["first_block", "teacache"] | None = None
    step_cache_threshold: Annotated[float, Field(ge=0, le=10)] | None = None
    # Results
    only_save_latents: bool = False
    output_dir: Name = "outputs"
    skip_existing: bool = True
    overwrite: bool = False
    contact_sheet: bool = False
    preview: Name | None = None
    # How it is computed
    fp16: bool | None = None
    bf16: bool | None = None
    allow_tf32: bool = False
    memory: Literal["auto"] | None = None
    weights: Literal["int8", "fp8", "nf4"] | None = None
    network_offload: Literal["none", "cpu", "blocks"] = "none"
    text_encoder_weights: Literal["int8", "fp8"] | None = None
    text_encoder_offload: Literal["none", "cpu", "blocks", "release"] = "release"
    attention: Literal["auto", "cudnn", "flash", "efficient", "math", "flash3", "sage", "xformers", "npu"] | None = None
    vae_tiling: bool | Literal["large"] = False
    vae_slicing: bool | None = None
    compile: bool = False
    device: Name | None = None
    # Ranks that share a sample; the timeout is in seconds
    model_parallel_size: AtLeast1 = 1
    sequence_parallel_size: AtLeast1 = 1
    sequence_attention: Literal["auto", "ulysses", "ring"] = "auto"
    cfg_parallel_size: Annotated[int, Field(ge=1, le=2)] = 1
    distributed_timeout: Annotated[int, Field(ge=10, le=30 * 86400)] = 1800

    @property
    def asks_for_prompts(self) -> bool:
        """Whether prompts come from the terminal, one by one."""
        return self.input_type == "cli" and self.prompt is None

    @property
    def enhances_by_endpoint(self) -> bool:
        """Whether `prompt_enhancer` is the address of an endpoint, not a folder."""
        return self.prompt_enhancer is not None and "://" in self.prompt_enhancer

    @property
    def enhancer_name(self) -> str:
        """The language model that writes prompts, for records."""
        model = "" if self.prompt_enhancer_model is None else f"{self.prompt_enhancer_model} at "
        return f"{model}{self.prompt_enhancer}"

    @property
    def ring_attention(self) -> bool | None:
        """Whether `sequence_attention` selects ring attention; None if the network chooses."""
        return {"auto": None, "ulysses": False, "ring": True}[self.sequence_attention]

    @property
    def noise_strength(self) -> float:
        """`strength`, or its default: how much of the steps a sample that starts from a video runs."""
        return 0.8 if self.strength is None else self.strength

    @property
    def num_held(self) -> int:
        """`held_frames`, or its default: frames held of each clip of `start` and `end`."""
        return 9 if self.held_frames is None else self.held_frames

    @property
    def encodes_clips(self) -> bool:
        """Whether sampling encodes a video or picture that is not the image of a prompt."""
        return any(given is not None for given in (self.video, self.start, self.end))

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield invalid combinations: the key, what was found, and the fix."""
        yield from self._shared_problems()
        yield from self._clip_problems()
        if self.input_type == "txt" and self.input_file is None and self.prompt is None:
            cure = "give args.prompt, args.input_file=prompts.txt (a prompt a line), or args.input_type=cli"
            yield "input_file", "is missing, and input_type is txt", cure
        if self.image is not None and self.prompt is None:
            yield (
                "image",
                "is given without a prompt",
                "give args.prompt too, or write prompt@@image into input_file",
            )
        if self.preview is not None and not self.preview.lower().endswith(PICTURES):
            cure = f"end the name with {', '.join(PICTURES)}"
            yield "preview", f"is '{self.preview}', which names no kind of picture", cure
        if self.preview is not None and self.only_save_latents:
            cure = "remove one of them"
            yield "preview", "is given, and with only_save_latents there is no VAE to decode it", cure
        if self.enhances_by_endpoint and self.prompt_enhancer_model is None:
            found = "is missing, and prompt_enhancer is the address of an endpoint"
            yield "prompt_enhancer_model", found, "give the name of a model that it serves"
        if self.prompt_enhancer_model is not None and not self.enhances_by_endpoint:
            found = "is given, and prompt_enhancer is no address of an endpoint"
            yield "prompt_enhancer_model", found, "remove it, or set args.prompt_enhancer=http://127.0.0.1:8000/v1"
        if self.prompt_enhancer_tokens is not None and (self.prompt_enhancer is None or self.enhances_by_endpoint):
            why = "an endpoint limits its own answers" if self.enhances_by_endpoint else "there is no prompt_enhancer"
            found = f"is given, and {why}"
            yield "prompt_enhancer_tokens", found, "remove it, or set args.prompt_enhancer=<folder of a chat model>"

    def _clip_problems(self) -> Iterator[tuple[str, str, str]]:
        if self.strength is not None and self.video is None:
            yield "strength", f"is {self.strength:g}, and there is no video", "set args.video=<file>, or remove it"
        if self.mask is not None and self.video is None:
            yield "mask", "is given, and there is no video to paint on", "set args.video=<file>, or remove it"
        if self.inversion is not None and self.video is None:
            yield "inversion", "is given, and there is no video to invert", "set args.video=<file>, or remove it"
        if self.inversion is not None and self.cfg_parallel_size > 1:
            cure = "remove it, or share a sample by sequence_parallel_size=2 instead of cfg_parallel_size"
            yield "inversion", "would leave the rank of the other branch without work", cure
        held = [name for name in ("start", "end") if getattr(self, name) is not None]
        if self.held_frames is not None and not held:
            found = f"is {self.held_frames}, and there is no clip to hold"
            yield "held_frames", found, "set args.start=<file> or args.end=<file>, or remove it"
        if self.num_held % 4 != 1:
            below = self.num_held - (self.num_held - 1) % 4
            yield "held_frames", f"is {self.num_held}", f"give 4k + 1 frames, such as {below} or {below + 4}"
        for name in ("video", "start", "end", "image", "control"):
            if self.loop and getattr(self, name) is not None:
                cure = "remove one of them: every frame of a loop is sampled from the prompt"
                yield "loop", f"is true, and {name} is given", cure
        if self.video is not None and held:
            cure = f"keep video to change a clip, or {' and '.join(held)} to hold frames"
            yield "video", f"is given, and {' and '.join(held)} too", cure
        if self.image is not None and self.start is not None:
            cure = "keep one: with start, the first of its held frames is the image"
            yield "image", "is given, and start too", cure

    def _shared_problems(self) -> Iterator[tuple[str, str, str]]:
        last_seed = _MAX_SEED - (self.batch_size - 1)
        if self.seed > last_seed:
            yield "seed", f"is {self.seed}", f"give a whole number from 0 to {last_seed}"
        if self.fp16 and self.bf16:
            yield "fp16", "fp16 and bf16 are both true", "keep the one that the model was released in"
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            found = f"is {list(self.guidance_interval)}, which holds no step"
            yield "guidance_interval", found, "give [first, last] shares of the steps, such as [0.0, 0.8]"
        if self.guidance_interval is not None and self.cfg_parallel_size > 1:
            cure = "remove it, or share a sample by sequence_parallel_size=2 instead of cfg_parallel_size"
            yield "guidance_interval", "would leave the rank of the other branch without work", cure
        if self.time_window_overlap is not None and self.time_window is None:
            found = f"is {self.time_window_overlap}, and there is no time_window"
            yield "time_window_overlap", found, "set args.time_window=<latent frames>, or remove it"
        for name, why in (("time_window", "each window has its own"), ("loop", "a loop begins elsewhere at each")):
            if self.step_cache is not None and getattr(self, name):
                found = f"is {self.step_cache}, which compares the forward passes of steps; {why}"
                yield "step_cache", found, f"remove it, or {name}"
        if self.step_cache_threshold is not None and self.step_cache is None:
            found = f"is {self.step_cache_threshold:g}, and there is no step_cache"
            yield "step_cache_threshold", found, "set args.step_cache=first_block, or remove it"
        if self.attention not in (None, "auto") and self.sequence_attention == "ring":
            found = f"is {self.attention}, and sequence_attention=ring has kernels of its own"
            yield "attention", found, "remove it, or set args.sequence_attention=ulysses"
        if self.step_cache is not None and any(entry.schedule for entry in self.loras):
            found = f"is {self.step_cache}, which does not notice that adapters change, and loras have a schedule"
            yield "step_cache", found, "remove it, or every schedule"
        if self.weights is not None and self.model_parallel_size > 1:
            found = f"is {self.weights}, and model_parallel_size {self.model_parallel_size}: layers are stored whole"
            cure = "remove args.weights, or share a sample by sequence_parallel_size and cfg_parallel_size instead"
            yield "weights", found, cure


@dataclass(frozen=True, kw_only=True)
class TrainingArgs(SamplingArgs):
    """The ``args`` section of a training run; docs/configuration.md explains every key.

    The keys of `SamplingArgs` apply to samples at evaluation, except `mode`, `load`, `base`, `fp16` and `bf16`, which
    configure training itself, and `seed`, which applies to every random draw.
    """

    # Keys in files for SAT without effect here, with the reason.
    IGNORED_PARAMS: ClassVar[dict[str, str]] = {
        "batch_from_same_dataset": "every clip is drawn on its own",
        "block_size": "a run draws clips one by one, not in blocks",
        "distributed_backend": "the device decides the backend",
        "iterable_dataset": "the class under data.target decides how clips are read",
        "resume_dataloader": "resuming always restores the position in the data",
        "test_data": "no test is run after training; evaluate on valid_data",
    }

    mode: Literal["finetune", "pretrain"] = "finetune"
    # Data
    train_data: tuple[Name, ...] = ()
    valid_data: tuple[Name, ...] | None = None
    train_data_weights: tuple[Annotated[float, Field(ge=0, le=1e9)], ...] | None = None
    split: str = "1,0,0"
    num_workers: _Workers = 2
    prefetch_factor: Annotated[int, Field(ge=1, le=1024)] = 2
    remote_cache: Name | None = None
    remote_cache_gb: Annotated[float, Field(ge=0.001, le=1e6)] = 50.0
    remote_retries: Annotated[int, Field(ge=0, le=100)] = 5
    max_bad_share: Share = 0.1
    check_clips: Literal["auto", "all", "none"] = "auto"
    latent_cache: Name | None = None
    text_cache: Name | None = None
    precompute: bool = False
    only_log_video_latents: bool = False
    # Length and learning rate
    scale_lr: bool = False
    train_iters: AtLeast1 | None = None
    epochs: AtLeast1 | None = None
    lr_decay_style: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "exponential", "constant"] = (
        "linear"
    )
    lr_decay_iters: AtLeast1 | None = None
    lr_decay_ratio: Share = 0.1
    lr_power: Annotated[float, Field(gt=0, le=100)] = 1.0
    lr_cycles: AtLeast1 = 1
    warmup: Annotated[float, Field(ge=0, le=1e9)] = 0.01
    auto_warmup_iters: AtLeast0 | None = None
    # How it is computed
    base_weights: Literal["bf16", "int8", "fp8", "nf4"] | None = None
    checkpoint_activations: bool | AtLeast1 | Literal["auto"] | None = None
    keep_attention: bool | None = None
    offload_activations: bool = False
    ema_decay: Share | None = None
    max_skipped_steps: AtLeast1 = 5
    # Evaluation
    eval_interval: Interval | None = None
    eval_iters: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    eval_batch_size: _Batch | None = None
    strict_eval: bool = False
    valid_prompts: str | tuple[str, ...] | None = None
    eval_measures: bool = False
    eval_lpips: Name | None = None
    eval_clip: Name | None = None
    # Results
    experiment_name: str = "finetune"
    save: Name = "ckpts"
    save_interval: Interval = 500
    async_save: bool = False
    keep_last: AtLeast1 | None = None
    keep_best: bool = False
    save_full: bool = False
    resume: str = "none"
    no_load_rng: bool = False
    no_save_rng: bool = False
    force_train: bool = False
    log_interval: AtLeast1 = 20
    peak_tflops: Annotated[float, Field(ge=0.001, le=1e6)] | None = None
    exit_interval: AtLeast1 | None = None
    stop_exit_code: Annotated[int, Field(ge=0, le=255)] = 0
    wandb: bool = False
    wandb_project_name: str | None = None

    @property
    def restores_rng(self) -> bool:
        """Whether a resumed run goes on with the random generators of its state."""
        return not (self.no_load_rng or self.no_save_rng)

    @property
    def precomputed(self) -> dict[Literal["latents", "text"], str]:
        """What `precompute` encodes, and into which folder: the given caches, or else both into one below `save`."""
        given = {"latents": self.latent_cache, "text": self.text_cache}
        named: dict[Any, str] = {kind: folder for kind, folder in given.items() if folder is not None}
        return named or {"latents": f"{self.save}/cache", "text": f"{self.save}/cache"}

    @property
    def split_shares(self) -> tuple[float, float, float]:
        """The shares of `train_data` for training, validation and test, normalised to a sum of 1.

        Raises:
            ValueError: `split` is not three nonnegative numbers, the first above 0.
        """
        train, valid, test = (float(share) for share in self.split.split(","))
        total = train + valid + test
        if train <= 0 or valid < 0 or test < 0 or not math.isfinite(total):
            raise ValueError(f"no shares: {self.split}")
        return train / total, valid / total, test / total

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield invalid combinations: the key, what was found, and the fix."""
        yield from self._shared_problems()
        if self.weights is not None:
            cure = f"set args.base_weights={self.weights} to train adapters on such weights"
            yield "weights", f"is {self.weights}, which is for sampling", cure
        if self.text_encoder_weights is not None:
            found = f"is {self.text_encoder_weights}, and training keeps the text encoder as it is"
            yield "text_encoder_weights", found, "set it when sampling"
        if self.device is not None:
            cure = "remove it; CUDA_VISIBLE_DEVICES, or its like, says what a process sees (-1: the CPU alone)"
            yield "device", f"is {self.device}, which is for sampling: training takes the device that it sees", cure
        if self.memory is not None:
            cure = "remove it, and add the settings that --check --card says, or a file of configs/memory"
            yield "memory", f"is {self.memory}, which chooses settings of sampling", cure
        if self.loras:
            cure = "remove it; to train on top of adapters, merge them first: tools/merge_lora_weight.py"
            yield "loras", "is given, and is for sampling", cure
        for name in (
            "prompt",
            "image",
            "video",
            "strength",
            "mask",
            "inversion",
            "start",
            "end",
            "held_frames",
            "control",
            "control_strength",
            "loop",
            "preview",
        ):
            if getattr(self, name) not in (None, False):
                yield name, "is given, and is for sampling", "give args.valid_prompts=[...] for samples at evaluation"
        for name in ("prompt_enhancer", "prompt_enhancer_model", "prompt_enhancer_tokens"):
            if getattr(self, name) is not None:
                found = "is given, and is for sampling: training uses captions and valid_prompts as they are written"
                yield name, found, "remove it; tools/enhance_prompts.py writes a file of prompts"
        yield from self._length_problems()
        yield from self._data_problems()
        if self.mode == "finetune" and self.load is None:
            cure = "set args.load=<folder that holds 'latest'>, or args.mode=pretrain to start from random weights"
            yield "load", "is missing, and fine-tuning starts from weights", cure
        if self.experiment_name in ("", ".", "..") or {"/", "\\", "\0"} & set(self.experiment_name):
            yield (
                "experiment_name",
                f"is {spelled(self.experiment_name)}",
                "give a name without slashes; save is the folder",
            )
        if not self.resume:
            yield "resume", "is empty", "give auto, none, or the folder of a run"
        if self.ema_decay in (0, 1):
            effect = "never follows" if self.ema_decay else "always equals"
            yield "ema_decay", f"is {self.ema_decay:g}, which {effect} the weights", "give 0.9999, or null for none"
        yield from self._evaluation_problems()

    def _evaluation_problems(self) -> Iterator[tuple[str, str, str]]:
        for name in ("eval_lpips", "eval_clip"):
            if getattr(self, name) is not None and not self.eval_measures:
                yield name, "is given, and eval_measures is false", "set args.eval_measures=true, or remove it"
        if self.eval_measures and self.only_log_video_latents:
            found = "is true, and only_log_video_latents too: there are no videos to measure"
            yield "eval_measures", found, "remove one of them"
        if self.valid_prompts is not None and not "".join(self.valid_prompts).strip():
            yield "valid_prompts", "is empty", "give a file, a list of prompts, or null for captions of the data"

    def _length_problems(self) -> Iterator[tuple[str, str, str]]:
        if self.train_iters is None and self.epochs is None:
            yield "train_iters", "is missing", "say how long to train: args.train_iters=1000, or args.epochs=10"
        if self.warmup > 1 and not float(self.warmup).is_integer():
            cure = "give a share of the run, from 0 to 1, or a whole number of steps"
            yield "warmup", f"is {self.warmup:g}", cure
        for name, style in (("lr_power", "polynomial"), ("lr_cycles", "cosine_with_restarts")):
            if getattr(self, name) != 1 and self.lr_decay_style != style:
                found = f"is {getattr(self, name):g}, and lr_decay_style {self.lr_decay_style} does not use it"
                yield name, found, f"set args.lr_decay_style={style}, or remove it"
        if self.lr_decay_ratio != 0.1 and self.lr_decay_style in ("linear", "constant"):
            found = f"is {self.lr_decay_ratio:g}, and lr_decay_style {self.lr_decay_style} does not use it"
            yield "lr_decay_ratio", found, "set args.lr_decay_style=cosine, or remove it"
        if self.lr_decay_ratio == 0 and self.lr_decay_style == "exponential":
            found = "is 0, to which an exponential falls at once: nothing would be trained"
            yield "lr_decay_ratio", found, "give a number above 0, such as 0.01"
        if self.train_iters is not None and self.epochs is not None:
            yield "epochs", "is given, and train_iters too", "keep one of them, and set the other to null"

    def _folder_problems(self, *names: str) -> Iterator[tuple[str, str, str]]:
        for name in names:
            if getattr(self, name) == ():
                or_null = "" if name == "train_data" else ", or null to use args.split"
                yield name, "names no folder", f"give args.{name}=[<folder with videos/ and labels/>]{or_null}"

    def _url_problems(self) -> Iterator[tuple[str, str, str]]:
        for name in ("train_data", "valid_data", "latent_cache", "text_cache", "save", "remote_cache"):
            value = getattr(self, name)
            for text in value if isinstance(value, tuple) else (value,):
                if not is_url(text):
                    continue
                if problem := url_problem(text):
                    yield name, *problem
                elif self.precompute and name.endswith("_cache") and name != "remote_cache":
                    cure = "encode with tools/prepare_dataset.py --out FOLDER --upload URL before, and set it to false"
                    yield "precompute", f"is true, and {name} is the URL {text}", cure
                elif name in ("save", "remote_cache"):
                    yield name, f"is {text}, and it is written to as files are", "name a folder of this machine"

    def _data_problems(self) -> Iterator[tuple[str, str, str]]:
        yield from self._url_problems()
        weights = self.train_data_weights
        yield from self._folder_problems("train_data", "valid_data")
        if weights is not None and self.train_data and len(weights) != len(self.train_data):
            found = f"has {len(weights)} entries, and train_data has {len(self.train_data)}"
            yield "train_data_weights", found, "give one number for each folder, or null"
        elif weights is not None and not all(weights):
            yield "train_data_weights", "holds a 0", "give numbers above 0; leave out a folder that is not to be used"
        try:
            shares = self.split_shares
        except ValueError:
            cure = "give the shares for training, validation and test, such as '98,2,0'; the first above 0"
            yield "split", f"is {self.split!r}", cure
            return
        if self.eval_interval is not None and self.valid_data is None and shares[1] == 0:
            cure = "set args.valid_data, or a share such as args.split='98,2,0', or args.eval_interval=null"
            yield "eval_interval", f"is {self.eval_interval}, but there is nothing to evaluate on", cure

    @property
    def unused(self) -> list[str]:
        """Keys that are set without effect, since `eval_interval` is null."""
        names = ("valid_data", "valid_prompts", "eval_batch_size", "strict_eval", "eval_measures", "keep_best")
        return [name for name in names if self.eval_interval is None and getattr(self, name)]


@dataclass(frozen=True, kw_only=True)
class EncodingArgs(TrainingArgs):
    """The ``args`` of a training run whose clips and captions are only encoded: the other keys have no effect."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield invalid combinations: the key, what was found, and the fix."""
        yield from self._folder_problems("train_data")
        yield from self._url_problems()


def names_of(cls: type[SamplingArgs]) -> list[str]:
    """Return the keys of a typed section, in the order of its class."""
    return [entry.name for entry in dataclasses.fields(cls)]


# Keys that only training reads or refuses. Sampling accepts and ignores them, so that one file works for both.
TRAINING_ARGS = frozenset({*names_of(TrainingArgs), *TrainingArgs.IGNORED_PARAMS, *REFUSED["args"]}) - frozenset(
    names_of(SamplingArgs)
)

# Keys of training in the files of configs/memory, which serve sampling too: no warning there.
MEMORY_ARGS = frozenset({"base_weights", "checkpoint_activations", "offload_activations"})
