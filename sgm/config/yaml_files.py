"""Read and merge YAML files: overrides (``section.key=value``), interpolation, and the file and line of every value.

Problems are collected, to be reported together. `sgm.config.load` checks the keys.
"""

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sgm.util import InputError, nearest

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's loader for YAML 1.1, but with ``1e-5`` as a number, as in YAML 1.2 and OmegaConf."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Problem:
    """One problem of the configuration: key path, file and line, what was found, and the fix."""

    path: str
    source: str
    found: str
    cure: str

    def __str__(self) -> str:
        place = " ".join(part for part in (self.path, f"({self.source})" if self.source else "") if part)
        return f"{place}: {self.found}\n      -> {self.cure}" if place else f"{self.found}\n      -> {self.cure}"


class ConfigError(InputError):
    """The configuration is invalid. Lists every problem with its path, origin and fix."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count} in the configuration:", *(f"  - {problem}" for problem in problems)]))


def dotted(path: KeyPath) -> str:
    """Join a key path with dots: ``model.conditioner_config.params.emb_models.0``."""
    return ".".join(str(key) for key in path)


@dataclass
class Merged:
    """The merged values of several files and overrides, with the origin of each.

    Attributes:
        values: the merged tree, plain Python values.
        origins: key path → the file and line, or the override, that last set it.
        problems: found so far.
        warnings: about accepted keys without effect.
        syntax_failed: a file could not be read, so values are not checked.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    syntax_failed: bool = False

    def origin(self, path: KeyPath) -> str:
        """Return the origin of `path` or of its nearest parent that has one."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "")

    def add(self, path: KeyPath, found: str, cure: str, *, source: str | None = None) -> None:
        """Record a problem at `path`."""
        self.problems.append(Problem(dotted(path), self.origin(path) if source is None else source, found, cure))


def read_merged(bases: Sequence[str | Path], overrides: Sequence[str] = ()) -> Merged:
    """Merge `bases` in order, later files overriding earlier ones, then apply `overrides`.

    Mappings merge key by key; lists and scalars are replaced. ``${section.key}`` refers to another value.
    """
    merged = Merged()
    trees = [tree for base in bases if (tree := _read_file(Path(base), merged)) is not None]
    if merged.syntax_failed:
        return merged
    try:
        tree = OmegaConf.to_container(OmegaConf.merge(*(OmegaConf.create(tree) for tree in trees)), resolve=False)
        for override in overrides:
            _apply_override(tree, override, merged)
        resolved: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
        merged.values = resolved
    except OmegaConfBaseException as error:
        key = tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", error.full_key or ""))
        merged.add(
            key,
            str(error).splitlines()[0],
            "correct the ${...} reference or give the value; it must name a key that one of the files sets",
        )
        merged.syntax_failed = True
    return merged


def _read_file(path: Path, merged: Merged) -> dict[str, Any] | None:
    """Return the sections of a file; None after adding its problems."""
    num_problems, place = len(merged.problems), str(path)
    try:
        tree = _parse(path.read_text(encoding="utf-8"), path, merged)
        if tree is not None and len(merged.problems) == num_problems:
            return tree
        found, cure = "holds no sections", "write sections such as 'args:' or 'model:', each with indented keys"
    except FileNotFoundError:
        siblings = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) or (f"; {path.parent} holds {', '.join(siblings)}" if siblings else "")
        found, cure = "the file does not exist", f"correct the path given to --base{hint}"
    except IsADirectoryError:
        found, cure = "is a folder, not a YAML file", "name the file inside it"
    except (OSError, UnicodeDecodeError) as error:
        found, cure = f"cannot be read: {error}", "give a readable YAML file in UTF-8"
    except yaml.MarkedYAMLError as error:
        mark, start = error.problem_mark or error.context_mark, error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        began = f" ({error.context}, which begins in line {start.line + 1})" if start and error.context else ""
        place = f"{path}:{line}:{column}"
        found = f"YAML syntax, line {line}, column {column}: {error.problem or error.context}{began}"
        cure = "correct that line; indent with spaces, write 'key: value', and close every quote and bracket"
    except yaml.YAMLError as error:
        found, cure = f"YAML syntax: {error}", "remove the characters that YAML does not allow"
    if len(merged.problems) == num_problems:
        merged.add((), found, cure, source=place)
    merged.syntax_failed = True
    return None


def _parse(text: str, path: Path, merged: Merged) -> dict[str, Any] | None:
    """Return the mapping in a YAML text, None for anything else; record origins, report duplicate keys."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            return None
        for key_path, line, duplicate_of in _walk(node, (), ()):
            if duplicate_of is not None:
                found = f"written twice in {path}, in line {duplicate_of} and in line {line}"
                cure = "remove one; YAML would silently keep the second"
                merged.add(key_path, found, cure, source=f"{path}:{line}")
            merged.origins[key_path] = f"{path}:{line}"
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _walk(node: yaml.Node, path: KeyPath, ancestors: tuple[int, ...]) -> Iterator[tuple[KeyPath, int, int | None]]:
    """Yield (key path, line, line of an earlier duplicate or None) for every key and list entry under `node`."""
    if id(node) in ancestors:
        mark = node.start_mark
        raise yaml.constructor.ConstructorError(None, None, "an alias refers to the value that contains it", mark)
    ancestors += (id(node),)
    if isinstance(node, yaml.MappingNode):
        first_lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            yield (*path, key), line, first_lines.get(key)
            first_lines.setdefault(key, line)
            yield from _walk(value_node, (*path, key), ancestors)
    elif isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            yield (*path, index), entry.start_mark.line + 1, None
            yield from _walk(entry, (*path, index), ancestors)


def _apply_override(tree: Any, override: str, merged: Merged) -> None:
    name, equals, text = override.partition("=")
    keys = [int(key) if key.isdigit() else key for key in name.strip().split(".")]
    source = f"command line: {override}"
    cure = "write section.key=value, for example args.seed=7; list entries are numbered from 0"
    if not equals or len(keys) < 2 or "" in keys:
        merged.add((), "not an override", cure, source=source)
        return
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 -- a SafeLoader
    except yaml.YAMLError:
        merged.add(tuple(keys), f"the value {text!r} is not YAML", "put text with : [ ] { } # in quotes", source=source)
        return
    container = tree
    for depth, key in enumerate(keys[:-1], start=1):
        child = _child(container, key)
        if child is None and isinstance(container, dict) and isinstance(keys[depth], str):
            child = container[key] = {}
            merged.origins[tuple(keys[:depth])] = source
        container = child
    if isinstance(container, list) and isinstance(keys[-1], int) and keys[-1] < len(container):
        container[keys[-1]] = value
    elif isinstance(container, dict):
        old = container.get(keys[-1])
        both = isinstance(old, dict) and isinstance(value, dict)
        container[keys[-1]] = OmegaConf.to_container(OmegaConf.merge(old, value)) if both else value
    else:
        merged.add(tuple(keys), "does not exist in the configuration", cure, source=source)
        return
    merged.origins[tuple(keys)] = source


def _child(container: Any, key: str | int) -> Any:
    """Return the entry of a mapping or list, or None."""
    if isinstance(container, dict):
        return container.get(key)
    if isinstance(container, list) and isinstance(key, int) and key < len(container):
        return container[key]
    return None
