"""The ``args`` section of a run, typed: `SamplingArgs`, and `TrainingArgs`, which adds the keys of training.

A training run also samples, to show its progress, so that its section holds the keys of sampling too. `sgm.config.load`
reads the sections into these classes; the bounds stand in the fields' metadata.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

_MAX_SEED = 2**63 - 1  # a signed 64-bit integer, for torch's generators


def _between(minimum: float, default: Any, maximum: float | None = None) -> Any:
    return field(default=default, metadata={"min": minimum, "max": maximum})


@dataclass(frozen=True, kw_only=True)
class SamplingArgs:
    """The ``args`` section of a sampling run. Null means: what the model says.

    Attributes:
        mode: ``inference``; the training modes are accepted from a training file.
        load: checkpoint folder of the network; holds ``latest``.
        base: checkpoint folder of the network that the adapters in `load` belong to; null takes the path that the
            folder records.
        input_type: ``txt`` reads prompts from `input_file`, ``cli`` asks for them on the terminal.
        input_file: one prompt a line; image-to-video lines are ``prompt@@image``.
        image2video: whether each prompt starts from an image.
        negative_prompt: what to steer away from; empty is the unconditional branch of training.
        sampling_image_size: height and width in pixels.
        sampling_num_frames: latent frames; 13 are 4·12+1 = 49 video frames. Models with a temporal patch of 2 take
            the even number with the padding frame (22) as the odd one without it (21).
        sampling_fps: frames per second of the written file.
        latent_channels: channels of the latents; must be the network's.
        num_steps: sampling steps; null takes those of ``model.sampler_config``.
        guidance_scale: strength of the prompt; null takes that of ``model.sampler_config``.
        seed: of the first sample of each prompt, whatever the other prompts are; the next samples count on from it.
        batch_size: samples per prompt, made together.
        only_save_latents: write the latents, do not decode them.
        output_dir: where the results go.
        skip_existing: leave prompts alone whose results are there.
        contact_sheet: write one picture with frames of all samples.
        force_inference: with a ``lora_config``, sample the base model where the checkpoint holds no adapters.
        fp16: run the network in float16.
        bf16: run the network in bfloat16.
        text_encoder_offload: where the text encoder goes after encoding: stays (``none``), to the ``cpu``, or out of
            memory (``release``).
        vae_tiling: decode in overlapping tiles: less memory, a little slower, slightly different at the seams.
        vae_slicing: decode the samples of a batch one by one: less memory, same result.
        device: where to run, e.g. ``cpu``; null takes the accelerator, or the CPU where there is none.
        model_parallel_size: ranks that share the layers of one network: each has a part of the heads and of the MLP.
        sequence_parallel_size: ranks that share one sample, in training too: each has a part of its tokens, and all
            weights. An iteration of training then has so many times fewer samples.
        sequence_attention: how they attend to each other's tokens: ``ulysses`` divides the heads, ``ring`` passes keys
            and values around; ``auto`` takes the former where there are enough heads.
        cfg_parallel_size: 2 lets one half of the ranks that share a sample compute the conditional, the other the
            unconditional branch of guidance; 1 computes both on each.
        distributed_timeout: seconds that a rank waits for others, in a collective as at the start; a rank that has lost
            another ends within it.
    """

    mode: Literal["inference", "finetune", "pretrain"] = "inference"
    load: str | None = None
    base: str | None = None
    input_type: Literal["txt", "cli"] = "cli"
    input_file: str | None = None
    image2video: bool | None = None
    negative_prompt: str | None = None
    sampling_image_size: tuple[int, int] | None = _between(1, None)
    sampling_num_frames: int | None = _between(1, None)
    sampling_fps: int = _between(1, 8)
    latent_channels: int | None = _between(1, None)
    num_steps: int | None = _between(1, None)
    guidance_scale: float | None = _between(0, None)
    seed: int = _between(0, 42)
    batch_size: int = _between(1, 1)
    only_save_latents: bool = False
    output_dir: str = "outputs"
    skip_existing: bool = True
    contact_sheet: bool = False
    force_inference: bool = False
    fp16: bool | None = None
    bf16: bool | None = None
    text_encoder_offload: Literal["none", "cpu", "release"] = "release"
    vae_tiling: bool = False
    vae_slicing: bool = True
    device: str | None = None
    model_parallel_size: int = _between(1, 1)
    sequence_parallel_size: int = _between(1, 1)
    sequence_attention: Literal["auto", "ulysses", "ring"] = "auto"
    cfg_parallel_size: int = _between(1, 1, 2)
    distributed_timeout: int = _between(10, 1800)

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield what cannot be: the key, what was found, and the cure."""
        yield from self._shared_problems()
        if self.input_type == "txt" and self.input_file is None:
            cure = "give args.input_file=prompts.txt (a prompt a line), or args.input_type=cli"
            yield "input_file", "is missing, and input_type is txt", cure

    def _shared_problems(self) -> Iterator[tuple[str, str, str]]:
        last_seed = _MAX_SEED - (self.batch_size - 1)
        if self.seed > last_seed:
            yield "seed", f"is {self.seed}", f"give a whole number from 0 to {last_seed}"
        if self.fp16 and self.bf16:
            yield "fp16", "fp16 and bf16 are both true", "keep the one that the model was released in"


@dataclass(frozen=True, kw_only=True)
class TrainingArgs(SamplingArgs):
    """The ``args`` section of a training run.

    The keys of `SamplingArgs` hold for the samples that it makes on the way, but `mode`, `load`, `base`, `fp16`,
    `bf16` and `device` for training itself, and `seed` for every random draw of it. An iteration is one step of the
    optimizer, accumulation included.

    Attributes:
        mode: ``finetune`` starts from the weights in `load`, ``pretrain`` may start from random ones.
        train_data: data sets: folders of clips and captions, manifests or archives, each of a format of its own.
        valid_data: the same for evaluation; null takes the share of `train_data` that `split` sets aside.
        train_data_weights: how often each folder of `train_data` is drawn from, relative to the others; null draws
            every clip equally often.
        split: shares of `train_data` for training, validation and test, as ``"98,2,0"``; without effect where
            `valid_data` is given.
        num_workers: processes per rank that decode clips; 0 decodes in the training process.
        prefetch_factor: batches that each worker keeps ready.
        max_bad_share: share of the clips that may turn out unreadable before the run stops.
        check_clips: whether clips are opened before training: ``all``, ``none``, or ``auto``: all of up to 2,000.
            Those that are not opened, and turn out bad, are replaced when their turn comes.
        latent_cache: folder that tools/prepare_dataset.py wrote: training clips come from it, and are neither decoded
            nor encoded.
        text_cache: the same for captions.
        only_log_video_latents: leave validation samples in latents, decode nothing.
        train_iters: iterations of the whole run; either this or `epochs`.
        epochs: passes over the training clips.
        lr_decay_style: how the learning rate falls after the warm-up.
        lr_decay_iters: iterations after which it has fallen; null takes all of the run.
        lr_decay_ratio: share of the learning rate that is left at the end.
        warmup: share of `lr_decay_iters` in which the learning rate rises from 0.
        auto_warmup_iters: first iterations, which run at 5 % of the learning rate; null takes 100 in ``finetune``
            and 0 in ``pretrain``.
        checkpoint_activations: recompute activations in the backward pass: less memory, slower. Null leaves it to
            ``transformer_args``.
        compile: compile the network's blocks: faster after a slow first iteration.
        ema_decay: decay of a moving average of the weights, saved under ``{iteration}-ema``; null keeps none.
        max_skipped_steps: iterations in a row that may be skipped for overflow before the run stops.
        eval_interval: iterations between evaluations; null evaluates never.
        eval_iters: batches per evaluation on every rank.
        eval_batch_size: clips per batch of evaluation; null takes the micro batch of training.
        strict_eval: evaluate on every validation clip once, whatever `eval_iters` says.
        valid_prompts: prompts to sample at each evaluation: a list, or a file such as `input_file`; null takes
            captions of the data.
        experiment_name: first part of the name of the run's folder.
        save: folder of the runs.
        save_interval: iterations between checkpoints.
        keep_last: checkpoints whose weights are kept; null keeps all.
        save_full: with a ``lora_config``, save the base weights beside the adapters.
        resume: ``none`` starts a run, ``auto`` continues the newest of `experiment_name` under `save` if there is
            one, a path continues that run.
        no_load_rng: resume without the states of the random generators.
        no_save_rng: save no states of random generators.
        force_train: give tensors that the checkpoint lacks their initial values, instead of refusing it.
        log_interval: iterations between lines of metrics.
        exit_interval: stop, with a checkpoint, after this many iterations of this process.
        wandb: log to Weights & Biases as well, where it is installed.
        wandb_project_name: the project there; null takes `experiment_name`.
    """

    # Keys that files for SAT carry, and why they change nothing here.
    IGNORED_PARAMS: ClassVar[dict[str, str]] = {
        "batch_from_same_dataset": "every clip is drawn on its own",
        "block_size": "a run draws clips one by one, not in blocks",
        "distributed_backend": "the device decides how ranks talk to each other",
        "iterable_dataset": "the class under data.target decides how clips are read",
        "resume_dataloader": "resuming always restores the position in the data",
        "test_data": "no test is run after training; evaluate on valid_data",
    }
    # Keys that SAT takes here and that would contradict another section, and what to write instead.
    MISPLACED_PARAMS: ClassVar[dict[str, str]] = {
        "clip_grad": "deepspeed.gradient_clipping",
        "gradient_accumulation_steps": "deepspeed.gradient_accumulation_steps",
        "lr": "deepspeed.optimizer.params.lr",
        "weight_decay": "deepspeed.optimizer.params.weight_decay",
        "zero_stage": "deepspeed.zero_optimization.stage",
    }

    mode: Literal["finetune", "pretrain"] = "finetune"
    # Data
    train_data: tuple[str, ...]
    valid_data: tuple[str, ...] | None = None
    train_data_weights: tuple[float, ...] | None = _between(0, None)
    split: str = "1,0,0"
    num_workers: int = _between(0, 2)
    prefetch_factor: int = _between(1, 2)
    max_bad_share: float = _between(0, 0.1, 1)
    check_clips: Literal["auto", "all", "none"] = "auto"
    latent_cache: str | None = None
    text_cache: str | None = None
    only_log_video_latents: bool = False
    # Length and learning rate
    train_iters: int | None = _between(1, None)
    epochs: int | None = _between(1, None)
    lr_decay_style: Literal["linear", "cosine", "constant", "exponential"] = "linear"
    lr_decay_iters: int | None = _between(1, None)
    lr_decay_ratio: float = _between(0, 0.1, 1)
    warmup: float = _between(0, 0.01, 1)
    auto_warmup_iters: int | None = _between(0, None)
    # How it is computed
    checkpoint_activations: bool | None = None
    compile: bool = False
    ema_decay: float | None = _between(0, None, 1)
    max_skipped_steps: int = _between(1, 5)
    # Evaluation
    eval_interval: int | None = _between(1, None)
    eval_iters: int = _between(1, 1)
    eval_batch_size: int | None = _between(1, None)
    strict_eval: bool = False
    valid_prompts: str | tuple[str, ...] | None = None
    # Results
    experiment_name: str = "finetune"
    save: str = "ckpts"
    save_interval: int = _between(1, 500)
    keep_last: int | None = _between(1, None)
    save_full: bool = False
    resume: str = "none"
    no_load_rng: bool = False
    no_save_rng: bool = False
    force_train: bool = False
    log_interval: int = _between(1, 20)
    exit_interval: int | None = _between(1, None)
    wandb: bool = False
    wandb_project_name: str | None = None

    @property
    def split_shares(self) -> tuple[float, float, float]:
        """The shares of `train_data` for training, validation and test; they add up to 1.

        Raises:
            ValueError: `split` is not three numbers, the first above 0 and none below.
        """
        train, valid, test = (float(share) for share in self.split.split(","))
        total = train + valid + test
        if train <= 0 or valid < 0 or test < 0 or not math.isfinite(total):
            raise ValueError(f"no shares: {self.split}")
        return train / total, valid / total, test / total

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield what cannot be: the key, what was found, and the cure."""
        yield from self._shared_problems()
        yield from self._length_problems()
        yield from self._data_problems()
        if self.mode == "finetune" and self.load is None:
            cure = "set args.load=<folder that holds 'latest'>, or args.mode=pretrain to start from random weights"
            yield "load", "is missing, and fine-tuning starts from weights", cure
        if not self.experiment_name or {"/", "\\"} & set(self.experiment_name):
            yield "experiment_name", f"is {self.experiment_name!r}", "give a name without slashes; save is the folder"
        if not self.resume:
            yield "resume", "is empty", "give auto, none, or the folder of a run"
        if self.ema_decay == 1:
            yield "ema_decay", "is 1, which never follows the weights", "give a number below 1, such as 0.9999, or null"
        if self.valid_prompts is not None and not self.valid_prompts:
            yield "valid_prompts", "is empty", "give a file, a list of prompts, or null for captions of the data"

    def _length_problems(self) -> Iterator[tuple[str, str, str]]:
        if self.train_iters is None and self.epochs is None:
            yield "train_iters", "is missing", "say how long to train: args.train_iters=1000, or args.epochs=10"
        if self.train_iters is not None and self.epochs is not None:
            yield "epochs", "is given, and train_iters too", "keep one of them, and set the other to null"

    def _data_problems(self) -> Iterator[tuple[str, str, str]]:
        weights = self.train_data_weights
        for name, folders in (("train_data", self.train_data), ("valid_data", self.valid_data)):
            if folders is not None and not folders:
                or_null = "" if name == "train_data" else ", or null to use args.split"
                yield name, "names no folder", f"give args.{name}=[<folder with videos/ and labels/>]{or_null}"
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
        """Keys that are set and have no effect because `eval_interval` is null."""
        names = ("valid_data", "valid_prompts", "eval_batch_size", "strict_eval")
        return [name for name in names if self.eval_interval is None and getattr(self, name)]


def names_of(cls: type[SamplingArgs]) -> list[str]:
    """Return the keys of a typed section, in the order of its class."""
    return [entry.name for entry in dataclasses.fields(cls)]


# What only training reads, or knows and refuses. Sampling accepts and ignores it, so that one file can serve both.
TRAINING_ARGS = frozenset(
    {*names_of(TrainingArgs), *TrainingArgs.IGNORED_PARAMS, *TrainingArgs.MISPLACED_PARAMS, "checkpoint_num_layers"}
    - {*names_of(SamplingArgs)}
)
