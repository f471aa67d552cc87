"""Load the configuration of a run: merge YAML files, check them against signatures, and type them.

Sections: ``args`` (this run), ``model`` (the engine and everything in it), ``data`` and ``deepspeed`` (training).
`load_config` reports all problems in one `ConfigError`, without building anything or reading weights. `sgm.checks`
checks files, shapes, precision and device.
"""

import copy
import dataclasses
import hashlib
import inspect
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from yaml.cyaml import CSafeDumper  # pyright: ignore[reportAttributeAccessIssue]

from sgm.config.args import MEMORY_ARGS, TRAINING_ARGS, EncodingArgs, SamplingArgs, TrainingArgs
from sgm.config.deepspeed_section import check_deepspeed, complete_deepspeed
from sgm.config.places import place_of
from sgm.config.references import escaped
from sgm.config.targets import ENGINE_TARGET, check_params, check_sections, trusting
from sgm.config.values import misfit, spelled
from sgm.config.yaml_files import ConfigError, KeyPath, Merged, Problem, dotted, read_merged
from sgm.log import control_characters, get_logger, warn_once
from sgm.urls import is_url
from sgm.util import PRECISIONS, Target, get_obj_from_str, nearest, no_character

__all__ = ["TRAINING_ARGS", "Config", "ConfigError", "Problem", "SamplingArgs", "TrainingArgs", "load_config"]

logger = get_logger(__name__)

Mode = Literal["inference", "train", "encode"]

_ARGS: Mapping[Mode, type[SamplingArgs]] = {"inference": SamplingArgs, "train": TrainingArgs, "encode": EncodingArgs}

SECTIONS = ("args", "model", "data", "deepspeed")

# Keys of files and folders, in any section.
_FILES = frozenset(
    "load base path image video mask start end control input_file prompt_enhancer output_dir preview save "
    "train_data valid_data latent_cache text_cache remote_cache eval_lpips eval_clip ckpt_path model_dir".split()
)
_MAX_INTEGER = 2**63 - 1
_PLACEHOLDER = re.compile(r"\{[^}]*\}|^\?\?\?$")
_CHOICES = re.compile(r"\{[^{}]*(?:\.\.|,)[^{}]*\}")  # of a URL: {000..099}, {a,b}
_FREE_TEXT = ("prompt", "negative_prompt", "inversion", "valid_prompts")  # keys in which braces are legal


@dataclass(frozen=True, kw_only=True)
class Config:
    """A checked configuration.

    Attributes:
        mode: the kind of run it was checked for.
        bases: the YAML files, in the order of merging.
        overrides: the ``section.key=value`` arguments.
        trust: packages that targets may come from besides; `model`, `data` and `deepspeed` hold them as `Target`.
        args: the typed ``args`` section: `TrainingArgs` in the modes ``train`` and ``encode``.
        model: the ``model`` section: parameters of the engine.
        data: the ``data`` section.
        deepspeed: the ``deepspeed`` section; in mode ``train`` complete, see `sgm.config.deepspeed_section`.
        merged: all sections as merged, plain values.
        warnings: about keys without effect.
        origins: dotted key path → the file and line, or the override, that set it.
    """

    mode: Mode
    bases: tuple[str, ...]
    overrides: tuple[str, ...]
    trust: tuple[str, ...] = ()
    args: SamplingArgs
    model: dict[str, Any]
    data: dict[str, Any]
    deepspeed: dict[str, Any]
    merged: dict[str, Any]
    warnings: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def engine(self) -> dict[str, Any]:
        """The engine's ``{target, params}`` section for `instantiate_from_config`."""
        return {"target": ENGINE_TARGET, "params": copy.deepcopy(self.model) | {"compile_model": self.args.compile}}

    @property
    def digest(self) -> str:
        """SHA-256 of the merged values, independent of the order of keys and the layout of the files."""
        return digest_of(self.merged)

    def located(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return the problems with the origin of each value or of its nearest parent."""
        located = []
        for problem in problems:
            path = problem.path
            while path and path not in self.origins:
                path = path.rpartition(".")[0]
            located.append(dataclasses.replace(problem, source=problem.source or self.origins.get(path, "")))
        return located

    def to_yaml(self) -> str:
        """Return the merged configuration as one YAML file; loading it gives the same digest."""
        return yaml.dump(escaped(self.merged), Dumper=CSafeDumper, sort_keys=False, allow_unicode=True)


def text_encoders(model: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the sections of text encoders in ``model``, each with its key path."""
    sections = ((model.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    for number, section in enumerate(sections):
        yield f"model.conditioner_config.params.emb_models.{number}", section


def digest_of(values: Any) -> str:
    """Return the SHA-256 of a tree of plain values, independent of the order of keys; keys may be numbers."""
    return hashlib.sha256(json.dumps(_with_text_keys(values), sort_keys=True, default=str).encode()).hexdigest()


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(entry) for key, entry in value.items()}
    return [_with_text_keys(entry) for entry in value] if isinstance(value, list | tuple) else value


def load_config(
    bases: Sequence[str | Path], overrides: Sequence[str] = (), *, mode: Mode, trust: Sequence[str] = ()
) -> Config:
    """Read, merge and check YAML files.

    Args:
        bases: files; later ones override earlier ones key by key. Lists are replaced as a whole.
        overrides: ``section.key=value``, applied last; values are YAML (``args.seed=7``, ``args.load=null``,
            ``args.sampling_image_size=[480,720]``), list entries are numbered from 0.
        mode: ``inference``, ``train``, or ``encode`` (the clips and captions of a training run): which keys have an
            effect.
        trust: packages that targets may come from besides: ``--trust`` of the command line.

    Returns:
        The checked configuration. Keys without effect are logged as warnings.

    Raises:
        ConfigError: every problem.
    """
    if not bases:
        raise ConfigError([Problem("", "", "no configuration file was given", "add --base configs/<model>.yaml ...")])
    merged = read_merged(bases, overrides)
    if merged.syntax_failed:
        raise ConfigError(merged.problems)
    _expand_home(merged.values)
    sections = _take_sections(merged)
    _share_text_length(sections["model"], merged, trust)
    sections = trusting(sections, trust)
    _check_values(merged.values, (), merged)
    args = _check_args(sections["args"], merged, mode)
    if sections["model"]:
        check_params(get_obj_from_str(ENGINE_TARGET), sections["model"], ("model",), merged)
    _check_training_sections(sections, merged, mode)
    _check_placeholders(sections, merged, mode)
    if merged.problems:
        raise ConfigError(merged.problems)
    merged.warnings += _odd_values(sections["model"], args)
    warn_once(logger, merged.warnings)
    if sections["model"].get("compile_model"):
        args = dataclasses.replace(args, compile=True)
    if mode == "train":
        sections["deepspeed"] = complete_deepspeed(sections["deepspeed"], sections["model"])
    return Config(
        mode=mode,
        bases=tuple(str(base) for base in bases),
        overrides=tuple(overrides),
        trust=tuple(trust),
        args=args,
        merged=merged.values,
        warnings=tuple(merged.warnings),
        origins={dotted(path): origin for path, origin in merged.origins.items()},
        **{name: sections[name] for name in ("model", "data", "deepspeed")},
    )


def _expand_home(value: Any, key: str = "") -> Any:
    """Expand ``~`` in the values of keys that name files, in place: shells leave it in ``args.save=~/runs``."""
    if isinstance(value, dict):
        value.update({name: _expand_home(entry, str(name)) for name, entry in value.items()})
    elif isinstance(value, list):
        value[:] = [_expand_home(entry, key) for entry in value]
    elif isinstance(value, str) and key in _FILES and value.partition("/")[0] == "~":
        return str(Path(value).expanduser())
    return value


def _take_sections(merged: Merged) -> dict[str, dict[str, Any]]:
    for name in merged.values:
        if name not in SECTIONS:
            home = place_of(str(name), str(name))
            found = f"unknown section{f'; this belongs to {home}' if home else nearest(str(name), list(SECTIONS))}"
            cure = f"move it there: {home}" if home else f"the sections are {', '.join(SECTIONS)}"
            source = merged.origin((name,)) or merged.origin((str(name),))  # of a key that is a number
            merged.add((name,), found, cure, source=source)
    sections = {}
    for name in SECTIONS:
        section = merged.values.get(name)
        if section is not None and not isinstance(section, dict):
            merged.add((name,), f"is {spelled(section)}", f"write '{name}:' and its keys below it, indented")
            section = None
        sections[name] = section or {}
    if not sections["model"] and not merged.problems:
        merged.add(("model",), "there is no model section", "give a model file as well, e.g. configs/cogvideox_2b.yaml")
    return sections


def _share_text_length(model: Any, merged: Merged, trust: Sequence[str]) -> None:
    """Let text encoders without ``max_length`` have the network's ``text_length``, and a network without it theirs."""
    positions = ("network_config", "params", "modules", "pos_embed_config", "params")
    embedders = _value_at(model, ("conditioner_config", "params", "emb_models"))
    paths: list[KeyPath] = [(*positions, "text_length")]
    for number, embedder in enumerate(embedders if isinstance(embedders, list) else ()):
        if _takes_length(_value_at(embedder, ("target",)), trust):
            paths.append(("conditioner_config", "params", "emb_models", number, "params", "max_length"))
    given = [path for path in paths if _value_at(model, path) is not None]
    for path in paths if given else ():
        holder = _value_at(model, path[:-1])
        if isinstance(holder, dict) and path[-1] not in holder:
            holder[path[-1]] = _value_at(model, given[0])
            merged.origins[("model", *path)] = merged.origin(("model", *given[0]))


def _takes_length(target: Any, trust: Sequence[str]) -> bool:
    """Whether a text encoder has the parameter ``max_length``; what is wrong with it is told later."""
    try:
        return "max_length" in inspect.signature(get_obj_from_str(Target(target, trust))).parameters
    except (TypeError, ValueError, AttributeError, ImportError):
        return False


def _value_at(value: Any, path: KeyPath) -> Any:
    """Return the value at a path of keys; None where there is none."""
    for key in path:
        if isinstance(value, list) and isinstance(key, int):
            value = value[key]
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def _check_values(value: Any, path: KeyPath, merged: Merged) -> None:
    """Report values that are never meant: numbers that no computer takes, and what is no character."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        _check_values(entry, (*path, key), merged)
    cure = None
    if isinstance(value, float) and not math.isfinite(value):
        cure = "give a finite number"
    elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
        cure = f"give a whole number from -{_MAX_INTEGER} to {_MAX_INTEGER}"
    elif isinstance(value, str) and no_character(value):
        cure = "remove the character that is none: U+0000, or half of a pair"
    elif isinstance(value, str) and (marks := control_characters(value)):
        merged.warnings.append(f"{dotted(path)} holds control characters, which text encoders drop: {marks}")
    if cure:
        merged.add(path, f"is {spelled(value)}", cure)
        merged.unusable.add(path)


def _check_args(section: Mapping[str, Any], merged: Merged, mode: Mode) -> SamplingArgs:
    """Check and type the ``args`` section, with defaults in place of wrong values."""
    cls = _ARGS[mode]
    hints = typing.get_type_hints(cls, include_extras=True)
    unused = [name for name in section if name in TRAINING_ARGS] if mode == "inference" else []
    section = _one_precision(section, merged)
    own = {name: _listed(value, hints.get(name, Any)) for name, value in section.items() if name not in unused}
    check_params(cls, own, ("args",), merged)
    wrong = {".".join(problem.path.split(".")[:2]) for problem in merged.problems}
    values = {name: value for name, value in own.items() if name in hints and f"args.{name}" not in wrong}
    typed = {name: _typed(value, hints[name]) for name, value in values.items()}
    args = cls(**typed)
    for name, found, cure in args.problems():
        if f"args.{name}" not in wrong:  # otherwise the problem would be about the default
            merged.add(("args", name), found, cure)
    if mode == "encode":
        return args
    if isinstance(args, TrainingArgs):
        unused, purpose = args.unused, "without args.eval_interval"
    else:
        unused, purpose = unused + ["mode"] * (args.mode != "inference"), "on sampling"
    unused = [name for name in unused if name not in MEMORY_ARGS]
    if unused:
        merged.warnings.append(f"no effect {purpose}: {', '.join(f'args.{name}' for name in unused)}")
    return args


def _odd_values(model: Mapping[str, Any], args: SamplingArgs) -> Iterator[str]:
    """Yield what is possible in a checked configuration, and hardly meant."""
    scale = model.get("scale_factor", 1)
    if not 1e-3 <= scale <= 1e3:
        yield f"model.scale_factor is {scale:g}; those of the released models are 0.7 and 1.15258426"
    if not isinstance(args, TrainingArgs):
        return
    for path, embedder in text_encoders(model):
        if embedder.get("ucg_rate") == 1:
            yield f"{path}.ucg_rate is 1, so every caption is dropped; usual is 0.1"
    if model.get("noised_image_input") and model.get("noised_image_dropout") == 1:
        yield "model.noised_image_dropout is 1, so every image is dropped; usual is 0.05"
    drawn = ((model.get("loss_fn_config") or {}).get("params") or {}).get("sigma_sampler_config") or {}
    sampler = drawn.get("params") or {}
    if sampler.get("group_num") and not sampler.get("uniform_sampling"):
        path = "model.loss_fn_config.params.sigma_sampler_config.params.group_num"
        yield f"{path} is {sampler['group_num']}, and has no effect without uniform_sampling"
    if args.warmup == 1:
        yield "args.warmup is 1, a share: the learning rate rises during the whole run; 2 and more are iterations"


def _typed(value: Any, hint: Any) -> Any:
    """Return a checked value in the type of its key: a tuple for a list, and objects for mappings in it."""
    entry_type = next(iter(typing.get_args(hint)), None)
    if isinstance(entry_type, type) and issubclass(entry_type, BaseModel):
        return tuple(entry_type.model_validate_json(json.dumps(entry)) for entry in value)
    return tuple(value) if isinstance(value, list) else value


def _one_precision(section: Mapping[str, Any], merged: Merged) -> Mapping[str, Any]:
    """Return the ``args`` with the later one of fp16 and bf16, if two files set both: together they are one choice."""
    places = {name: merged.origin(("args", name)).rpartition(":")[0] for name in ("fp16", "bf16")}
    files = [merged.sources.index(place) if place in merged.sources else -1 for place in places.values()]
    if not (section.get("fp16") is section.get("bf16") is True) or -1 in files or files[0] == files[1]:
        return section
    earlier, later = sorted(places, key=lambda name: merged.sources.index(places[name]))
    merged.warnings.append(f"args.{earlier} has no effect: {places[later]}, a later file, sets args.{later}")
    merged.values["args"][earlier] = None  # also in the configuration that the run folder gets
    return {**section, earlier: None}


def _listed(value: Any, hint: Any) -> Any:
    """Wrap a text into a list if the annotation accepts only lists of texts."""
    wants_list = isinstance(value, str) and misfit(value, hint) and not misfit([value], hint)
    return [value] if wants_list else value


def _check_training_sections(sections: Mapping[str, Mapping[str, Any]], merged: Merged, mode: Mode) -> None:
    """Check the sections of training, ``data`` and ``deepspeed``."""
    if mode == "inference":
        if unused := [name for name in ("data", "deepspeed") if sections[name]]:
            merged.warnings.append(f"no effect on sampling: the sections {', '.join(unused)}")
        return
    deepspeed = sections["deepspeed"]
    if mode == "encode":  # of which only the precision matters
        deepspeed = {name: value for name, value in deepspeed.items() if name in PRECISIONS}
    check_deepspeed(deepspeed, merged)
    if not merged.values.get("data"):
        merged.add(("data",), "there is no data section", "give a training file as well, e.g. configs/sft.yaml")
    check_sections(sections["data"], ("data",), merged, expected=bool(sections["data"]))


def _check_placeholders(sections: Mapping[str, Mapping[str, Any]], merged: Merged, mode: Mode) -> None:
    """Report placeholders such as ``{your path}`` in values that have an effect."""
    used = {"inference": ("args", "model"), "train": SECTIONS, "encode": ("args", "model", "data")}
    for section in used[mode]:
        for path, text in _strings(sections[section], (section,)):
            unused = mode == "inference" and section == "args" and path[1] in TRAINING_ARGS
            unused |= mode == "encode" and section == "args" and path[1] != "train_data"
            plain = _CHOICES.sub("", text) if is_url(text) else text
            if unused or not _PLACEHOLDER.search(plain) or any(key in _FREE_TEXT for key in path):
                continue
            cure = f"put the real value there, in the file or with {dotted(path)}=..."
            merged.add(path, f"still holds a placeholder: {spelled(text)}", cure)


def _strings(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _strings(entry, (*path, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _strings(entry, (*path, index))
