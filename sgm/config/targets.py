"""Check YAML sections against the signatures of their target classes, without building anything.

A section is ``{target: dotted.Class, params: {...}}``; sections nest in parameters at any depth. The target must exist,
be a trusted class (`sgm.util.get_obj_from_str`) that fits its place (`sgm.config.parts`), its constructor must accept
every parameter and type, and no required parameter may be missing. `sgm.config.refused`
lists parameters refused with a specific fix. A class may declare:

- ``IGNORED_PARAMS: {parameter: reason}``: accepted with a warning.
- ``SECTION_TYPES: {parameter: class}``: a mapping parsed by the class. Annotating with a pydantic model is equivalent.
- ``PARAMS_FOR_MODULES``: parameters for the sections under ``modules``; warns about those that no section accepts.
- ``ENTRY_KEYS`` (also of its module): the keys of sections in its lists, if more than target and params.
"""

import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel

from sgm.config.parts import PARTS
from sgm.config.places import place_of
from sgm.config.refused import REFUSED, Refused, refused_by
from sgm.config.values import misfit, spelled
from sgm.config.yaml_files import KeyPath, Merged, dotted
from sgm.util import PROJECT, InputError, Target, get_obj_from_str, nearest

ENGINE_TARGET = "sgm.models.video_diffusion.SATVideoDiffusionEngine"

_SECTION_KEYS = ("target", "params")
_TARGET_KEYS = ("target", "type")  # the second one in deepspeed.optimizer
# The network adds parameters (layer count, sizes) to the sections under this key, so none is required in YAML.
_COMPLETED_BY_PARENT = "modules"


def trusting(tree: Any, trust: Sequence[str]) -> Any:
    """Return sections whose targets may come from the packages `trust` too: ``--trust`` of the command line."""
    if isinstance(tree, dict):
        return {
            key: Target(entry, trust) if key in _TARGET_KEYS and isinstance(entry, str) else trusting(entry, trust)
            for key, entry in tree.items()
        }
    return [trusting(entry, trust) for entry in tree] if isinstance(tree, list) else tree


def check_params(
    cls: Callable[..., Any], params: Mapping[str, Any], path: KeyPath, merged: Merged, *, partial: bool = False
) -> None:
    """Check `params`, and every section in them, against the constructor of `cls`.

    Args:
        cls: the class, or a pydantic model.
        params: its parameters in YAML.
        path: of `params`.
        merged: gets the problems and warnings.
        partial: the section's parent adds further parameters.
    """
    accepted = accepted_by(cls)
    if accepted is None:
        return
    ignored: Mapping[str, str] = getattr(cls, "IGNORED_PARAMS", {})
    refused = {**refused_by(cls), **REFUSED.get(dotted(path), {})}
    named = [str(key) for key in path if isinstance(key, str)]
    owner = named[-1] if is_model(cls) or len(path) == 1 else getattr(cls, "__name__", str(cls))
    for name, value in params.items():
        place = (*path, name)
        if name in ignored:
            merged.warnings.append(f"{dotted(place)} has no effect: {ignored[name]}")
        elif name in refused:
            _check_refused(refused[name], value, place, merged)
        elif name in accepted.hints or accepted.open_ended:
            _check_value(cls, name, value, accepted.hints.get(name, Any), place, merged)
        else:
            merged.add(place, *_unknown(str(name), owner, dotted(place), [*accepted.hints, *refused]))
    for name in () if partial else accepted.required:
        if name not in params and name not in refused:
            source = merged.origin(path)
            merged.add((*path, name), f"missing; {owner} needs it", f"add '{name}:' there", source=source)
    _warn_untaken(cls, params, path, merged)


def _unknown(name: str, owner: str, place: str, known: Sequence[str]) -> tuple[str, str]:
    """Return what was found and the fix for a key that `owner` does not know."""
    found, home, hint = f"unknown key for {owner}", place_of(name, place), nearest(name, [*known])
    if home is not None:
        return f"{found}; this belongs to {home}", f"move it there, or remove it: {home}"
    if hint:
        return f"{found}{hint}", "correct or remove it"
    return found, f"remove it, or write one of: {', '.join(known)}" if known else "remove it; there are none"


def check_sections(
    value: Any,
    path: KeyPath,
    merged: Merged,
    *,
    partial: bool = False,
    expected: bool = False,
    keys: Sequence[str] = _SECTION_KEYS,
) -> None:
    """Check every ``{target, params}`` section in a tree of mappings and lists.

    Args:
        value: the tree.
        path: of `value`.
        merged: gets the problems and warnings.
        partial: the section's parent adds further parameters.
        expected: `value` itself must be a section.
        keys: of a section.
    """
    if isinstance(value, Mapping) and "target" in value:
        _check_section(value, path, merged, partial=partial, keys=keys)
    elif isinstance(value, Mapping) and expected:
        cure = "write target: module.Class and, under params:, what its constructor takes"
        if path[-1] == "lora_config":  # an overlay of configs/lora without what it changes
            cure = "give the model's file that ends with _lora before this one, or write a target"
        merged.add(path, "has no 'target:'", cure)
    elif isinstance(value, Mapping | list):
        of_modules = path[-1] == _COMPLETED_BY_PARENT
        entries: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, entry in entries:
            if of_modules and not isinstance(entry, Mapping | None):
                merged.add((*path, key), f"is {spelled(entry)}", "write target: module.Class and params:")
            given = {"partial": partial or of_modules, "expected": of_modules, "keys": keys}
            check_sections(entry, (*path, key), merged, **given)


def _check_section(
    section: Mapping[str, Any], path: KeyPath, merged: Merged, *, partial: bool, keys: Sequence[str]
) -> None:
    refused = REFUSED.get(dotted(path[:-1]), {})
    for name, value in section.items():
        if name in refused:
            _check_refused(refused[name], value, (*path, name), merged)
        elif name not in keys:
            found = f"a section with a target has no such key{nearest(str(name), [*keys])}"
            home = place_of(str(name), dotted((*path, name))) if path == ("data",) else None
            place, cure = (f"; this belongs to {home}", home) if home else ("", "under params:")
            merged.add((*path, name), found + place, f"move it there: {cure}, or write one of: {', '.join(keys)}")
    params = {} if section.get("params") is None else section["params"]
    if not isinstance(params, Mapping):
        merged.add((*path, "params"), f"is {spelled(params)}", "write the parameters as indented keys")
        return
    try:
        cls = get_obj_from_str(section["target"])
    except InputError as error:
        merged.add((*path, "target"), str(error), "name a class that fits; docs/configuration.md lists them")
    except ImportError as error:
        found = f"importing '{section['target']}' failed: {error}"
        merged.add((*path, "target"), found, "install the missing package (pip install .)")
    else:
        if problem := _misplaced(cls, path):
            merged.add((*path, "target"), f"'{section['target']}' is not {problem}", "name a class of that kind")
            return
        check_params(cls, params, (*path, "params"), merged, partial=partial)


def _misplaced(cls: type, path: KeyPath) -> str | None:
    """Return what the section at `path` must build, and why `cls` is no such class; None if it is."""
    keys = [key for key in path if isinstance(key, str)]
    part = PARTS.get(keys[-1] if keys else "")
    problem = part and part.misfit(cls)
    return f"{part.name}: {problem}" if part and problem else None


def _check_refused(entry: Refused, value: Any, place: KeyPath, merged: Merged) -> None:
    if problem := entry.misfit(value):
        merged.add(place, *problem)


def _check_value(cls: Callable[..., Any], name: str, value: Any, hint: Any, place: KeyPath, merged: Merged) -> None:
    model = next(filter(is_model, (hint, *typing.get_args(hint))), None)
    if model is not None and typing.get_origin(hint) is tuple:
        _check_entries(model, value, place, merged)
        return
    inner = getattr(cls, "SECTION_TYPES", {}).get(name, model)
    if inner is not None and isinstance(value, Mapping):
        check_params(inner, value, place, merged)
        return
    if problem := misfit(value, hint if model is None else dict | None):
        merged.add(place, *problem)
    keys = _SECTION_KEYS
    if isinstance(value, list):
        keys = getattr(cls, "ENTRY_KEYS", None) or getattr(inspect.getmodule(cls), "ENTRY_KEYS", keys)
    check_sections(value, place, merged, expected=name.endswith("_config"), keys=keys)


def _check_entries(model: Any, value: Any, place: KeyPath, merged: Merged) -> None:
    """Check a list of mappings, which `model` describes."""
    if problem := misfit(value, list):
        merged.add(place, problem[0], f"{problem[1]}, each entry a mapping (indented keys)")
        return
    for index, entry in enumerate(value):
        if problem := misfit(entry, dict):
            merged.add((*place, index), *problem)
        else:
            check_params(model, entry, (*place, index), merged)


def _warn_untaken(cls: Callable[..., Any], params: Mapping[str, Any], path: KeyPath, merged: Merged) -> None:
    """Warn about ``PARAMS_FOR_MODULES`` that no section under ``modules`` accepts."""
    given = [name for name in getattr(cls, "PARAMS_FOR_MODULES", ()) if params.get(name) is not None]
    modules = params.get(_COMPLETED_BY_PARENT)
    if not given or not isinstance(modules, Mapping):
        return
    taken: set[str] = set()
    for section in modules.values():
        try:
            taken.update(inspect.signature(get_obj_from_str(section["target"])).parameters)
        except (InputError, ImportError, TypeError, ValueError, KeyError):  # reported where the section is checked
            continue
    merged.warnings += [
        f"{dotted((*path, name))} has no effect: nothing under {_COMPLETED_BY_PARENT} takes it"
        for name in given
        if name not in taken
    ]


@dataclass(frozen=True)
class Accepted:
    """The parameters of a class: types, required ones, and whether it accepts any others (``**kwargs``)."""

    hints: Mapping[str, Any]
    required: Collection[str]
    open_ended: bool = False


@cache
def accepted_by(cls: Callable[..., Any]) -> Accepted | None:
    """Return the parameters of a class or pydantic model; None for a C class without signature."""
    if is_model(cls):
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        hints = {n: Annotated[(f.annotation, *f.metadata)] if f.metadata else f.annotation for n, f in fields.items()}
        return Accepted(hints, [name for name, field in fields.items() if field.is_required()])
    try:
        parameters = inspect.signature(cls).parameters
    except (TypeError, ValueError):
        return None
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    hints = _hints(cls)
    return Accepted(
        hints={name: hints.get(name, Any) for name in named},
        required=[name for name, parameter in named.items() if parameter.default is parameter.empty],
        open_ended=any(p.kind is p.VAR_KEYWORD for p in parameters.values()),
    )


def is_model(cls: Any) -> bool:
    """Whether `cls` is a pydantic model."""
    return inspect.isclass(cls) and issubclass(cls, BaseModel)


def _hints(cls: Callable[..., Any]) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(cls.__init__ if inspect.isclass(cls) else cls, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}
    if (cls.__module__ or "").partition(".")[0] in PROJECT:
        return hints
    # In other projects `int` is often only the type of the default, such as SAT's lora_alpha = 1.
    return {name: float if hint is int else hint for name, hint in hints.items()}
