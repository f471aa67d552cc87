"""Hold YAML sections against the signatures of the classes that they name, without building anything.

A section is ``{target: dotted.Class, params: {...}}``. Parameters may hold further sections, at any depth. What is
checked: the target exists; every parameter is one that its constructor takes, and has the type that the constructor
states where that is a plain one; no required parameter is missing. Parameters that a class lists in its
``IGNORED_PARAMS`` are accepted with a warning that gives the reason. A mapping that a class parses itself is held
against the dataclass named in its ``SECTION_TYPES: {parameter: dataclass}``. What a class only hands on to the sections
in its ``modules`` is named in its ``PARAMS_FOR_MODULES``; it is warned about where no section takes it.
"""

import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from sgm.config.yaml_files import KeyPath, Merged, dotted
from sgm.util import InputError, get_obj_from_str, nearest

ENGINE_TARGET = "sgm.models.video_diffusion.SATVideoDiffusionEngine"

# What a section holds. A class that takes a list of sections which hold more (a conditioner's emb_models) says so in
# ENTRY_KEYS, its own or its module's.
_SECTION_KEYS = ("target", "params")
# Sections under this key are completed by the network that holds them (layer count, sizes), so that a parameter
# that is missing in YAML is not missing.
_COMPLETED_BY_PARENT = "modules"

_PROJECT = ("sgm", "vae_modules", "dit_video_concat", "data_video")

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def check_params(
    cls: Callable[..., Any],
    params: Mapping[str, Any],
    path: KeyPath,
    merged: Merged,
    *,
    partial: bool = False,
    supplied: Collection[str] = (),
) -> list[str]:
    """Check `params`, found at `path`, against the constructor of `cls`, and every section inside them.

    Args:
        cls: the class.
        params: its parameters in YAML.
        path: where they were found.
        merged: takes the problems.
        partial: whether the section's parent adds parameters to those in YAML.
        supplied: parameters that the code adds, so that they are not missing.

    Returns:
        Warnings about accepted parameters without effect. Problems are added to `merged`.
    """
    ignored: Mapping[str, str] = getattr(cls, "IGNORED_PARAMS", {})
    inner_types: Mapping[str, type] = getattr(cls, "SECTION_TYPES", {})
    warnings = [f"{dotted((*path, name))} has no effect: {ignored[name]}" for name in params if name in ignored]
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):  # classes written in C tell nothing about themselves
        return warnings
    accepted = {n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    hints = _hints(cls)
    name_of_class = getattr(cls, "__name__", str(cls))
    for name, value in params.items():
        place = (*path, name)
        if name in ignored:
            continue
        if name not in accepted and not open_ended:
            hint = nearest(str(name), [*accepted])
            cure = f"remove it, or write one of: {', '.join(accepted)}" if accepted else "remove it; there are none"
            merged.add(place, f"unknown key for {name_of_class}{hint}", "correct or remove it" if hint else cure)
            continue
        if name in hints and not fits(value, hints[name]):
            merged.add(place, *misfit(value, hints[name]))
        if name in inner_types and isinstance(value, Mapping):
            warnings += check_params(inner_types[name], value, place, merged)
            continue
        keys = _entry_keys(cls) if isinstance(value, list) else _SECTION_KEYS
        expected = name.endswith("_config")
        warnings += check_sections(value, place, merged, partial=False, expected=expected, keys=keys)
    for name, parameter in accepted.items():
        required = parameter.default is parameter.empty and name not in supplied and not partial
        if required and name not in params:
            cure = f"add '{name}:' there"
            merged.add((*path, name), f"missing; {name_of_class} needs it", cure, source=merged.origin(path))
    return warnings + _taken_by_no_module(cls, params, path)


def _taken_by_no_module(cls: Callable[..., Any], params: Mapping[str, Any], path: KeyPath) -> list[str]:
    given = [name for name in getattr(cls, "PARAMS_FOR_MODULES", ()) if params.get(name) is not None]
    modules = params.get(_COMPLETED_BY_PARENT)
    if not given or not isinstance(modules, Mapping):
        return []
    taken: set[str] = set()
    for section in modules.values():
        try:
            taken.update(inspect.signature(get_obj_from_str(section["target"])).parameters)
        except (InputError, ImportError, TypeError, ValueError, KeyError):  # reported where the section is checked
            continue
    return [
        f"{dotted((*path, name))} has no effect: nothing under {_COMPLETED_BY_PARENT} takes it"
        for name in given
        if name not in taken
    ]


def check_sections(
    value: Any,
    path: KeyPath,
    merged: Merged,
    *,
    partial: bool,
    expected: bool = False,
    keys: Sequence[str] = _SECTION_KEYS,
    supplied: Collection[str] = (),
) -> list[str]:
    """Check every ``{target, params}`` section in `value`, a tree of mappings and lists found at `path`.

    Args:
        value: the tree.
        path: where it was found.
        merged: takes the problems.
        partial: whether the section's parent adds parameters to those in YAML.
        expected: whether `value` itself must be a section.
        keys: what a section may hold.
        supplied: parameters that the code adds to `value` itself, so that they are not missing.

    Returns:
        Warnings about accepted parameters without effect.
    """
    if isinstance(value, Mapping) and "target" in value:
        return _check_section(value, path, merged, partial=partial, keys=keys, supplied=supplied)
    if expected and isinstance(value, Mapping):
        merged.add(
            path, "has no 'target:'", "write target: module.Class and, under params:, what its constructor takes"
        )
        return []
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    inside_modules = bool(path) and path[-1] == _COMPLETED_BY_PARENT
    return [
        warning
        for key, entry in entries
        for warning in check_sections(entry, (*path, key), merged, partial=partial or inside_modules, keys=keys)
    ]


def _check_section(
    section: Mapping[str, Any],
    path: KeyPath,
    merged: Merged,
    *,
    partial: bool,
    keys: Sequence[str],
    supplied: Collection[str],
) -> list[str]:
    for name in section:
        if name not in keys:
            merged.add(
                (*path, name),
                f"a section with a target has no such key{nearest(str(name), [*keys])}",
                f"move it under params:, or write one of: {', '.join(keys)}",
            )
    params = section.get("params") or {}
    if not isinstance(params, Mapping):
        merged.add((*path, "params"), f"is {params!r}", "write the parameters as indented keys")
        return []
    try:
        cls = get_obj_from_str(section["target"])
    except InputError as error:
        merged.add((*path, "target"), str(error), "name a class that can be imported; docs/configuration.md lists them")
        return []
    except ImportError as error:
        cure = "install the missing package (pip install .)"
        merged.add((*path, "target"), f"importing '{section['target']}' failed: {error}", cure)
        return []
    return check_params(cls, params, (*path, "params"), merged, partial=partial, supplied=supplied)


def _entry_keys(cls: Callable[..., Any]) -> Sequence[str]:
    return getattr(cls, "ENTRY_KEYS", None) or getattr(inspect.getmodule(cls), "ENTRY_KEYS", _SECTION_KEYS)


def _hints(cls: Callable[..., Any]) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(cls.__init__ if inspect.isclass(cls) else cls)
    except (NameError, TypeError, AttributeError):
        return {}
    if (cls.__module__ or "").partition(".")[0] in _PROJECT:
        return hints
    # Elsewhere `int` is often the type of a default that may as well be a fraction, such as SAT's lora_alpha = 1.
    return {name: float if hint is int else hint for name, hint in hints.items()}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value`, as YAML gives it, can be passed where `hint` is annotated. Unknown annotations fit anything.

    YAML has lists only: they fit tuples and sequences. A whole number fits where a number is asked for.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, str)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(fits(entry, inner[0]) for entry in value)
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            return isinstance(value, list) and all(fits(entry, inner[0]) for entry in value)
        return isinstance(value, list) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    return True


def misfit(value: Any, hint: Any) -> tuple[str, str]:
    """Return what was found and the cure for a `value` that does not fit `hint`."""
    if isinstance(value, dict) and list(value.values()) == [None]:  # YAML reads {your path} without quotes as a mapping
        return f"still holds a placeholder: {{{next(iter(value))}}}", "put the real value there"
    takes_text = str in (hint, *typing.get_args(hint))
    quoting = "; text that YAML reads as something else needs quotes" if takes_text else ""
    return f"is {value!r}", f"give {in_words(hint)}{quoting}"


def in_words(hint: Any) -> str:
    """Say what `hint` accepts, for an error message."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(option) for option in inner))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple and Ellipsis not in inner:
        return f"a list of {len(inner)}, each {in_words(inner[0])}"
    if origin in (list, Sequence, tuple):
        return f"a list, each entry {in_words(inner[0])}"
    if origin in (dict, Mapping):
        return "a mapping (indented keys)"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
