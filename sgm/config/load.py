"""The configuration of a run: YAML files merged, held against what the code takes, and typed.

Sections: ``args`` (this run), ``model`` (the engine and everything in it), ``data`` and ``deepspeed`` (training).
`load_config` reports everything that is wrong in one `ConfigError`; nothing is built and no weights are read. What
must be looked up on the disk or on the machine (files, shapes, precision) is the part of `sgm.checks.sampling`.
"""

import copy
import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sgm.config.args import TRAINING_ARGS, SamplingArgs, TrainingArgs, names_of
from sgm.config.deepspeed_section import check_deepspeed, check_loss_scale, complete_deepspeed
from sgm.config.targets import ENGINE_TARGET, check_params, check_sections, fits, in_words, misfit
from sgm.config.yaml_files import ConfigError, KeyPath, Merged, Problem, dotted, read_merged
from sgm.log import get_logger, warn_once
from sgm.util import InputError, get_obj_from_str, nearest

__all__ = ["TRAINING_ARGS", "Config", "ConfigError", "Problem", "SamplingArgs", "TrainingArgs", "load_config"]

logger = get_logger(__name__)

Mode = Literal["inference", "train"]

SECTIONS = ("args", "model", "data", "deepspeed")

_PLACEHOLDER = re.compile(r"\{[^}]*\}")
_FREE_TEXT = ("negative_prompt", "valid_prompts")  # braces are legal there
_DATA_FOLDER = "data_dir"  # what a data set is told by the loop over args.train_data, not by YAML


@dataclass(frozen=True, kw_only=True)
class Config:
    """A checked configuration.

    Attributes:
        mode: what it was checked for.
        bases: the YAML files, in the order of merging.
        overrides: the ``section.key=value`` arguments.
        args: the typed ``args`` section: `TrainingArgs` in mode ``train``.
        model: the ``model`` section: parameters of the engine.
        data: the ``data`` section.
        deepspeed: the ``deepspeed`` section; in mode ``train`` complete, see `sgm.config.deepspeed_section`.
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
        return digest_of(self.merged)

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


def digest_of(values: Any) -> str:
    """SHA-256 of a tree of plain values, whatever the order of its keys; numbers may be keys, as frame counts are."""
    return hashlib.sha256(json.dumps(_with_text_keys(values), sort_keys=True, default=str).encode()).hexdigest()


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(entry) for key, entry in value.items()}
    return [_with_text_keys(entry) for entry in value] if isinstance(value, list | tuple) else value


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
    if merged.problems:
        raise ConfigError(merged.problems)
    warn_once(logger, warnings)
    if mode == "train":
        sections["deepspeed"] = complete_deepspeed(sections["deepspeed"], sections["model"])
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
            home = "args" if name in names_of(SamplingArgs) or name in TRAINING_ARGS else None
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


def _check_args(section: Mapping[str, Any], merged: Merged, mode: Mode) -> tuple[SamplingArgs, list[str]]:
    """Type the ``args`` section; return it, with defaults in place of what is wrong, and warnings."""
    cls = TrainingArgs if mode == "train" else SamplingArgs
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {"train_data": ()} if mode == "train" else {}
    wrong: set[str] = set()
    for name, value in section.items():
        if name not in fields:
            _check_foreign_arg(name, value, merged, mode)
            continue
        hint, bounds = hints[name], fields[name].metadata
        if isinstance(value, str) and not fits(value, hint) and fits([value], hint):
            value = [value]
        if not fits(value, hint):
            found, cure = misfit(value, hint)
        elif bounds and not _within(value, bounds["min"], bounds["max"]):
            limit = (
                f"at least {bounds['min']:g}" if bounds["max"] is None else f"{bounds['min']:g} to {bounds['max']:g}"
            )
            found, cure = f"is {value!r}", f"give {in_words(hint)}, {limit}"
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
            continue
        merged.add(("args", name), found, cure)
        wrong.add(name)
    args = cls(**values)
    for name, found, cure in args.problems():
        if name not in wrong:  # what follows from a wrong value would only mislead
            merged.add(("args", name), found, cure)
    return args, _args_warnings(section, args)


def _check_foreign_arg(name: str, value: Any, merged: Merged, mode: Mode) -> None:
    """Judge a key that the class of this run does not have: training's, another section's, SAT's, or nobody's."""
    if name in TrainingArgs.IGNORED_PARAMS or (mode == "inference" and name in TRAINING_ARGS):
        return
    if name in TrainingArgs.MISPLACED_PARAMS:
        found, cure = "belongs elsewhere", f"remove it, and set {TrainingArgs.MISPLACED_PARAMS[name]}"
    elif name == "checkpoint_num_layers":
        if value == 1:
            return
        found = f"is {value!r}, but every block is recomputed by itself"
        cure = "remove it; args.checkpoint_activations switches recomputation on and off"
    else:
        found = f"unknown key{nearest(str(name), names_of(SamplingArgs) + sorted(TRAINING_ARGS))}"
        cure = "correct or remove it; docs/configuration.md lists the keys of args"
    merged.add(("args", name), found, cure)


def _args_warnings(section: Mapping[str, Any], args: SamplingArgs) -> list[str]:
    if isinstance(args, TrainingArgs):
        ignored = TrainingArgs.IGNORED_PARAMS
        warnings = [f"args.{name} has no effect: {ignored[name]}" for name in section if name in ignored]
        if args.unused:
            unused = ", ".join(f"args.{name}" for name in args.unused)
            warnings.append(f"no effect without args.eval_interval: {unused}")
        return warnings
    unused = [f"args.{name}" for name in section if name in TRAINING_ARGS]
    unused += ["args.mode"] if args.mode != "inference" else []
    return [f"no effect on sampling: {', '.join(unused)}"] if unused else []


def _within(value: Any, least: float, most: float | None) -> bool:
    entries = value if isinstance(value, list) else [] if value is None else [value]
    return all(entry >= least and (most is None or entry <= most) for entry in entries)


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
    """Check what only training reads: ``data`` and ``deepspeed``."""
    if mode == "inference":
        check_loss_scale(sections["deepspeed"], merged)
        unused = [name for name in ("data", "deepspeed") if sections[name]]
        return [f"no effect on sampling: the sections {', '.join(unused)}"] if unused else []
    warnings = check_deepspeed(sections["deepspeed"], merged)
    data = sections["data"]
    if not data:
        if not merged.values.get("data"):
            cure = "give a training file as well, e.g. configs/sft.yaml"
            merged.add(("data",), "there is no data section", cure)
        return warnings
    params = data.get("params")
    if isinstance(params, Mapping) and _DATA_FOLDER in params:
        cure = "remove it, and set args.train_data (and args.valid_data)"
        merged.add(("data", "params", _DATA_FOLDER), "is given for every folder in turn", cure)
    return warnings + check_sections(
        data, ("data",), merged, partial=False, expected=True, supplied=frozenset({_DATA_FOLDER})
    )


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
