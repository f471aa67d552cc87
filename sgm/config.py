"""The configuration of a run: YAML files merged, held against what the code takes, and typed.

Sections: ``args`` (this run), ``model`` (the engine and everything in it), ``data`` and ``deepspeed`` (training).
`load_config` reports everything that is wrong in one `ConfigError`; nothing is built and no weights are read. What
must be looked up on the disk or on the machine (files, shapes, precision) is the part of `sgm.check`.
"""

import copy
import dataclasses
import hashlib
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sgm.config_targets import ENGINE_TARGET, check_params, fits, in_words, misfit
from sgm.log import get_logger
from sgm.util import InputError, get_obj_from_str, nearest
from sgm.yaml_files import ConfigError, KeyPath, Merged, Problem, dotted, read_merged

__all__ = ["Config", "ConfigError", "Problem", "SamplingArgs", "load_config"]

logger = get_logger(__name__)

Mode = Literal["inference", "train"]

SECTIONS = ("args", "model", "data", "deepspeed")

# Keys of the reference's training ``args``. Sampling accepts and ignores them, so that one file can serve both.
TRAINING_ARGS = frozenset(
    "experiment_name no_load_rng no_save_rng train_iters epochs eval_iters eval_interval eval_batch_size strict_eval "
    "save save_interval log_interval exit_interval train_data valid_data test_data train_data_weights split "
    "num_workers prefetch_factor block_size iterable_dataset batch_from_same_dataset force_train "
    "only_log_video_latents checkpoint_activations checkpoint_num_layers gradient_accumulation_steps clip_grad "
    "zero_stage lr weight_decay lr_decay_style lr_decay_iters lr_decay_ratio warmup resume keep_last "
    "resume_dataloader valid_prompts distributed_backend wandb wandb_project_name".split()
)

_PLACEHOLDER = re.compile(r"\{[^}]*\}")
_FREE_TEXT = ("negative_prompt", "valid_prompts")  # braces are legal there
_MAX_SEED = 2**63 - 1  # a signed 64-bit integer, for torch's generators


def _at_least(minimum: float, default: Any) -> Any:
    return field(default=default, metadata={"min": minimum})


@dataclass(frozen=True, kw_only=True)
class SamplingArgs:
    """The ``args`` section of a sampling run. Null means: what the model says.

    Attributes:
        mode: ``inference``; the training modes are accepted from a training file.
        load: checkpoint folder of the network; holds ``latest``.
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
        model_parallel_size: ranks that share one network; 1 in sampling.
    """

    mode: Literal["inference", "finetune", "pretrain"] = "inference"
    load: str | None = None
    input_type: Literal["txt", "cli"] = "cli"
    input_file: str | None = None
    image2video: bool | None = None
    negative_prompt: str | None = None
    sampling_image_size: tuple[int, int] | None = _at_least(1, None)
    sampling_num_frames: int | None = _at_least(1, None)
    sampling_fps: int = _at_least(1, 8)
    latent_channels: int | None = _at_least(1, None)
    num_steps: int | None = _at_least(1, None)
    guidance_scale: float | None = _at_least(0, None)
    seed: int = _at_least(0, 42)
    batch_size: int = _at_least(1, 1)
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
    model_parallel_size: int = _at_least(1, 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A checked configuration.

    Attributes:
        mode: what it was checked for.
        bases: the YAML files, in the order of merging.
        overrides: the ``section.key=value`` arguments.
        args: the typed ``args`` section.
        model: the ``model`` section: parameters of the engine.
        data: the ``data`` section.
        deepspeed: the ``deepspeed`` section.
        merged: all sections as merged, plain values.
        warnings: what was accepted without effect.
        origins: the file and line, or the override, that set each dotted key path.
    """

    mode: Mode
    bases: tuple[str, ...]
    overrides: tuple[str, ...]
    args: SamplingArgs
    model: dict[str, Any]
    data: dict[str, Any]
    deepspeed: dict[str, Any]
    merged: dict[str, Any]
    warnings: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def engine(self) -> dict[str, Any]:
        """The ``{target, params}`` section that `instantiate_from_config` builds the engine from."""
        return {"target": ENGINE_TARGET, "params": copy.deepcopy(self.model)}

    @property
    def digest(self) -> str:
        """SHA-256 of the merged values; the order of keys and the spelling of the files do not matter."""
        return hashlib.sha256(json.dumps(self.merged, sort_keys=True, default=str).encode()).hexdigest()

    def located(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return the problems, each with the place where its value, or the nearest parent of it, was set."""
        located = []
        for problem in problems:
            path = problem.path
            while path and path not in self.origins:
                path = path.rpartition(".")[0]
            located.append(dataclasses.replace(problem, source=problem.source or self.origins.get(path, "")))
        return located

    def to_yaml(self) -> str:
        """Return the merged configuration as one YAML file, which `load_config` reads back to the same digest."""
        return yaml.safe_dump(self.merged, sort_keys=False, allow_unicode=True)


def load_config(bases: Sequence[str | Path], overrides: Sequence[str] = (), *, mode: Mode) -> Config:
    """Read, merge and check YAML files.

    Args:
        bases: files; a later one wins key by key. Lists are replaced as a whole.
        overrides: ``section.key=value``, applied last; values are YAML (``args.seed=7``, ``args.load=null``,
            ``args.sampling_image_size=[480,720]``), list entries are numbered from 0.
        mode: ``inference`` or ``train``: which keys have an effect.

    Returns:
        The checked configuration. What it accepts without using is logged as a warning.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    if not bases:
        raise ConfigError([Problem("", "", "no configuration file was given", "add --base configs/<model>.yaml ...")])
    merged = read_merged(bases, overrides)
    if merged.syntax_failed:
        raise ConfigError(merged.problems)
    sections = _take_sections(merged)
    args, warnings = _check_args(sections["args"], merged, mode)
    warnings += _check_model(sections["model"], merged)
    warnings += _check_training_sections(sections, merged, mode)
    _check_placeholders(sections, merged, mode)
    if merged.problems or args is None:
        raise ConfigError(merged.problems)
    for warning in warnings:
        logger.warning("%s", warning)
    return Config(
        mode=mode,
        bases=tuple(str(base) for base in bases),
        overrides=tuple(overrides),
        args=args,
        merged=merged.values,
        warnings=tuple(warnings),
        origins={dotted(path): origin for path, origin in merged.origins.items()},
        **{name: sections[name] for name in ("model", "data", "deepspeed")},
    )


def _take_sections(merged: Merged) -> dict[str, dict[str, Any]]:
    for name in merged.values:
        if name not in SECTIONS:
            home = "args" if name in _args_fields() or name in TRAINING_ARGS else None
            cure = f"indent it under '{home}:'" if home else f"the sections are {', '.join(SECTIONS)}"
            merged.add((name,), f"unknown section{nearest(str(name), list(SECTIONS))}", cure)
    sections = {}
    for name in SECTIONS:
        section = merged.values.get(name)
        if section is not None and not isinstance(section, dict):
            merged.add((name,), f"is {section!r}", f"write '{name}:' and its keys below it, indented")
            section = None
        sections[name] = section or {}
    if not sections["model"] and not merged.problems:
        merged.add(("model",), "there is no model section", "give a model file as well, e.g. configs/cogvideox_2b.yaml")
    return sections


def _args_fields() -> dict[str, dataclasses.Field[Any]]:
    return {entry.name: entry for entry in dataclasses.fields(SamplingArgs)}


def _check_args(section: Mapping[str, Any], merged: Merged, mode: Mode) -> tuple[SamplingArgs | None, list[str]]:
    """Type the ``args`` section; return it (None where impossible) and warnings."""
    fields, hints = _args_fields(), typing.get_type_hints(SamplingArgs)
    values: dict[str, Any] = {}
    for name, value in section.items():
        path = ("args", name)
        if name in fields:
            minimum = fields[name].metadata.get("min")
            if not fits(value, hints[name]):
                merged.add(path, *misfit(value, hints[name]))
            elif minimum is not None and _smallest(value) < minimum:
                merged.add(path, f"is {value!r}", f"give {in_words(hints[name])}, at least {minimum:g}")
            else:
                values[name] = tuple(value) if isinstance(value, list) else value
        elif name not in TRAINING_ARGS:
            known = sorted({*fields, *TRAINING_ARGS})
            cure = "correct or remove it; docs/configuration.md lists the keys of args"
            merged.add(path, f"unknown key{nearest(str(name), known)}", cure)
    if len(values) < sum(name in fields for name in section):
        return None, []
    args = SamplingArgs(**values)
    warnings = []
    if mode == "inference":
        unused = [f"args.{name}" for name in section if name in TRAINING_ARGS]
        unused += ["args.mode"] if args.mode != "inference" else []
        if unused:
            warnings.append(f"no effect on sampling: {', '.join(unused)}")
        _check_sampling_args(args, merged)
    last_seed = _MAX_SEED - (args.batch_size - 1)
    if args.seed > last_seed:
        merged.add(("args", "seed"), f"is {args.seed}", f"give a whole number from 0 to {last_seed}")
    if args.fp16 and args.bf16:
        merged.add(("args", "fp16"), "fp16 and bf16 are both true", "keep the one that the model was released in")
    return args, warnings


def _check_sampling_args(args: SamplingArgs, merged: Merged) -> None:
    if args.input_type == "txt" and args.input_file is None:
        cure = "give args.input_file=prompts.txt (a prompt a line), or args.input_type=cli"
        merged.add(("args", "input_file"), "is missing, and input_type is txt", cure)
    if args.model_parallel_size != 1:
        found = f"is {args.model_parallel_size}; sampling shares no network between ranks"
        cure = "set args.model_parallel_size=1; with torchrun, prompts are spread over the ranks"
        merged.add(("args", "model_parallel_size"), found, cure)


def _smallest(value: float | list[float] | None) -> float:
    return math.inf if value is None else min(value) if isinstance(value, list) else value


def _check_model(section: Mapping[str, Any], merged: Merged) -> list[str]:
    if not section:
        return []
    try:
        engine = get_obj_from_str(ENGINE_TARGET)
    except InputError as error:  # pragma: no cover -- a broken installation
        merged.add(("model",), str(error), "reinstall this package")
        return []
    return check_params(engine, section, ("model",), merged)


def _check_training_sections(sections: Mapping[str, Mapping[str, Any]], merged: Merged, mode: Mode) -> list[str]:
    for name in sections["deepspeed"]:
        if name in ("loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale"):
            merged.add(
                ("deepspeed", name),
                "stands outside 'fp16:', where DeepSpeed never reads it",
                f"move it to deepspeed.fp16.{name}, or remove it",
            )
    unused = [name for name in ("data", "deepspeed") if sections[name]]
    if mode == "inference" and unused:
        return [f"no effect on sampling: the sections {', '.join(unused)}"]
    return []


def _check_placeholders(sections: Mapping[str, Mapping[str, Any]], merged: Merged, mode: Mode) -> None:
    """Report values such as ``{your path}`` that were never filled in, where they have an effect."""
    for section in ("args", "model") if mode == "inference" else SECTIONS:
        for path, text in _strings(sections[section], (section,)):
            unused = mode == "inference" and section == "args" and path[1] in TRAINING_ARGS
            if unused or not _PLACEHOLDER.search(text) or any(key in _FREE_TEXT for key in path):
                continue
            cure = f"put the real value there, in the file or with {dotted(path)}=..."
            merged.add(path, f"still holds a placeholder: {text!r}", cure)


def _strings(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _strings(entry, (*path, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _strings(entry, (*path, index))
