"""Read and merge YAML files: overrides (``section.key=value``), references, and the file and line of every value.

Problems are collected, to be reported together. `sgm.config.load` checks the keys. Size and depth are bounded before
anything is expanded, so that a small file cannot become a large one.
"""

import json
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.cyaml import CParser  # pyright: ignore[reportAttributeAccessIssue]
from yaml.resolver import Resolver

from sgm.config.places import place_of
from sgm.config.references import MAX_VALUES, BadReferenceError, KeyPath, escaped, resolve
from sgm.config.values import shortened
from sgm.io import NotAFileError, denied_text, reason_of, require_regular
from sgm.project import packaged, project, shipped
from sgm.util import InputError, nearest

MAX_BYTES = 2_000_000  # of a file
MAX_DEPTH = 64  # of lists and mappings in each other
_MAX_BITS = 4096  # of a whole number; Python refuses to write longer ones in decimal

_OUTPUTS = ("output_dir", "save")  # keys of folders that need not exist
_MISSING = re.compile(r"there is no |does not exist")
_RELATIVE = re.compile(r"(?<![\w/.-])[\w.-]+(?:/[\w.-]+)+")

# Other names of keys, which later code sees under the first one.
ALIASES: dict[KeyPath, str] = {("args", "videos_per_prompt"): "batch_size"}

_TAG = "tag:yaml.org,2002:"
_TYPES = {_TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}


# Keys whose values on the command line are sentences, which may look like anything.
_PROMPT = ("args", "prompt")
_SENTENCES = (_PROMPT, ("args", "negative_prompt"))


class _Empty:
    """The value of a key after which nothing is written, until `_merge` decides what it means."""


_EMPTY = _Empty()


class _Loader(Composer, CParser, SafeConstructor, Resolver):
    """PyYAML's loader for YAML 1.1, with ``1e-5`` as a number, dates and ``010`` as text, as in YAML 1.2; bounded.

    libyaml parses, which takes a fifth of the time; nodes are composed here, since they are counted.
    """

    def __init__(self, text: str) -> None:
        CParser.__init__(self, text)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._depth = 0
        # Node → (values, levels) with aliases expanded. An alias comes after its anchor, so its extent is known.
        self._extents: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node and what it holds."""
        if self._depth > MAX_DEPTH:
            raise self._too_much(self.peek_event().start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and id(node) not in self._extents:
            held = [self._extents.get(id(child), (1, 1)) for child in _children(node)]
            values, levels = sum(extent[0] for extent in held), max((extent[1] for extent in held), default=0)
            self._extents[id(node)] = (values + 1, levels + 1)
            if values > 2 * MAX_VALUES or levels > MAX_DEPTH:  # twice, since keys count here
                raise self._too_much(node.start_mark)
            if node.tag not in _TYPES:
                tag = node.tag.replace(_TAG, "!!")
                raise yaml.constructor.ConstructorError(
                    None, None, f"values of type {tag} are not used", node.start_mark
                )
        return node

    def _too_much(self, mark: yaml.Mark) -> yaml.YAMLError:
        return _refusal(
            f"with its aliases, this has over {MAX_VALUES:,} values or {MAX_DEPTH} levels", mark, "shorten it"
        )

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise ValueError
        except (ValueError, OverflowError, LookupError):  # LookupError: a tag before nothing, or before other words
            kind = "number" if node.tag in (_TAG + "int", _TAG + "float") else "value of its tag"
            found = f"'{shortened(node.value)}' is no {kind} that can be used"
            raise _refusal(found, node.start_mark, "correct it, or put text in quotes") from None
        if value is None and node.tag == _TAG + "null" and node.value.lower() not in ("", "~", "null"):
            raise _refusal(f"'{shortened(node.value)}' is not null", node.start_mark, "remove the tag or the text")
        return _EMPTY if value is None and not node.value else value


def _refusal(found: str, mark: yaml.Mark, cure: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, found, mark, cure)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TAG + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _first in "-+0123456789":  # 16:9 is text, and no number to the base of 60; neither is 010, to the base of 8
    _Loader.yaml_implicit_resolvers[_first].insert(
        0, (_TAG + "str", re.compile(r"^[-+]?(?:\d[\d_]*(?::[0-5]?\d)+(?:\.[\d_]*)?|0[0-7_]+)$"))
    )
_Loader.add_implicit_resolver(
    _TAG + "float",
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
    """The configuration is invalid. Lists every problem with its path, origin and fix.

    Attributes:
        problems: all of them.
        elsewhere: files that are missing here, but not in the project's folder; the message says that alone.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        self.elsewhere = _in_the_project(problems)
        if self.elsewhere:
            there = ", ".join(self.elsewhere[:3]) + (", ..." if len(self.elsewhere) > 3 else "")
            super().__init__(f"run it from the project's folder: cd {project()} ({there}: there, not in {Path.cwd()})")
            return
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count} in the configuration:", *(f"  - {problem}" for problem in problems)]))

    def __reduce__(self) -> Any:  # to reach other ranks
        return type(self), (self.problems,)


def _in_the_project(problems: Sequence[Problem]) -> list[str]:
    """Return the relative paths that problems call missing, and that exist in the project's folder."""
    if packaged():  # nothing to go to: `shipped` has looked there
        return []
    missing = [
        problem.found if problem.path else f"{problem.found}: {problem.source}"
        for problem in problems
        if _MISSING.search(problem.found)
    ]
    names = dict.fromkeys(name for text in missing for name in _RELATIVE.findall(text))
    return [name for name in names if not Path(name).exists() and (project() / name).exists()]


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
        sources: the files, in the order of merging.
        unusable: paths of values that mean nothing anywhere; one problem each is enough.
        syntax_failed: a file could not be read, so values are not checked.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    unusable: set[KeyPath] = field(default_factory=set)
    syntax_failed: bool = False

    def origin(self, path: KeyPath) -> str:
        """Return the origin of `path` or of its nearest parent that has one."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "")

    def add(self, path: KeyPath, found: str, cure: str, *, source: str | None = None) -> None:
        """Record a problem at `path`, unless its value is known to be unusable."""
        if any(each[: len(path)] == path for each in self.unusable):  # itself, or an entry of it
            return
        self.problems.append(Problem(dotted(path), self.origin(path) if source is None else source, found, cure))


def read_merged(bases: Sequence[str | Path], overrides: Sequence[str] = ()) -> Merged:
    """Merge `bases` in order, later files overriding earlier ones, then apply `overrides`.

    Mappings merge key by key; lists and scalars are replaced. ``${section.key}`` refers to another value.
    """
    merged = Merged(sources=[shipped(str(base)) for base in bases])
    trees = [_read_file(Path(source), merged) for source in merged.sources]
    if merged.syntax_failed:
        return merged
    tree: dict[str, Any] = {}
    for each in trees:
        tree = _merge(tree, each)
    for override in overrides:
        _apply_override(tree, override, merged)
    try:
        merged.values = _with_shipped(resolve(tree))
    except BadReferenceError as error:
        merged.add(error.path, error.found, error.cure)
        merged.syntax_failed = True
    return merged


def _with_shipped(value: Any) -> Any:
    """Return a tree in which paths of files that a wheel has installed are complete."""
    if isinstance(value, dict):
        return {key: entry if key in _OUTPUTS else _with_shipped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_shipped(entry) for entry in value]
    return shipped(value) if isinstance(value, str) else value


def read_list(path: Path, *, option: str, other: tuple[str, str]) -> list[Any]:
    """Read a YAML file that holds a list, by the rules of configurations.

    Args:
        path: the file.
        option: of the command line that names it.
        other: what to say of another content, and what to write.

    Raises:
        ConfigError: it is no such file.
    """
    merged = Merged()
    content = _read_file(path, merged, yaml.SequenceNode, option, other)
    if content is None:
        raise ConfigError(merged.problems)
    return _merge(None, content)


def _merge(old: Any, new: Any) -> Any:
    """Return `old` with the values of `new`: mappings key by key, everything else replaced by an unshared copy.

    A key below which all is commented out changes nothing of the mapping that it had; ``null`` removes it.
    """
    if new is _EMPTY:
        return old if isinstance(old, dict) else None
    if isinstance(new, dict):
        base = old if isinstance(old, dict) else {}
        return {**base, **{key: _merge(base.get(key), value) for key, value in new.items()}}
    return [_merge(None, entry) for entry in new] if isinstance(new, list) else new


def _read_file(
    path: Path,
    merged: Merged,
    kind: type[yaml.Node] = yaml.MappingNode,
    option: str = "--base",
    other: tuple[str, str] = (
        "holds no sections",
        "write sections such as 'args:' or 'model:', each with indented keys",
    ),
) -> Any:
    """Return the content of a file if it is of a kind; None after adding its problems, `other` if it is another one."""
    num_problems, place = len(merged.problems), str(path)
    try:
        tree = _parse(_text_of(path), path, merged, kind)
        if tree is not None and len(merged.problems) == num_problems:
            return tree
        found, cure = other
    except FileNotFoundError:
        siblings = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) or (f"; {path.parent} holds {', '.join(siblings)}" if siblings else "")
        found, cure = "the file does not exist", f"correct the path given to {option}{hint}"
        if option == "--base" and (home := place_of(str(path), str(path))):
            found, cure = "is a key, and no file", f"write {home}=..., with an equals sign before the value"
    except NotAFileError as error:
        cure = "name the file inside it" if path.is_dir() else "write its content into a file"
        found = str(error).removeprefix("it ").replace("not a file", "not a YAML file")
    except PermissionError as error:
        found, _, cure = denied_text(error).partition("; ")
    except UnicodeDecodeError as error:
        found, cure = f"is not UTF-8 text (byte {error.start})", "give a readable YAML file in UTF-8"
    except (OSError, ValueError) as error:  # ValueError: a name with U+0000
        found, cure = f"cannot be read: {reason_of(error)}", "give a readable YAML file in UTF-8"
    except yaml.MarkedYAMLError as error:
        mark, start = error.problem_mark or error.context_mark, error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        began = f" ({error.context}, which begins in line {start.line + 1})" if start and error.context else ""
        place = f"{path}:{line}:{column}"
        found = f"YAML syntax, line {line}, column {column}: {error.problem or error.context}{began}"
        usual = "correct that line; indent with spaces, write 'key: value', and close every quote and bracket"
        cure = getattr(error, "note", None) or usual
    except yaml.YAMLError as error:
        found, cure = f"YAML syntax: {error}", "remove the characters that YAML does not allow"
    if len(merged.problems) == num_problems:
        merged.add((), found, cure, source=place)
    merged.syntax_failed = True
    return None


def _text_of(path: Path) -> str:
    require_regular(path)
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise yaml.YAMLError(f"is larger than {MAX_BYTES / 1e6:g} MB, so it is no configuration")
    return content.decode("utf-8")


def _parse(text: str, path: Path, merged: Merged, kind: type[yaml.Node]) -> Any:
    """Return the content of a YAML text, None if it is of another kind; record origins, report duplicate keys."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, kind):
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
        raise _refusal("an alias refers to the value that contains it", node.start_mark, "write out the value")
    ancestors += (id(node),)
    if isinstance(node, yaml.MappingNode):
        first_lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":  # before the keys of the mapping itself, which replace merged ones
                merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for each in reversed(merged):
                    yield from _walk(each, path, ancestors) if isinstance(each, yaml.MappingNode) else ()
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _TAG + "null":
                raise _refusal("a key must be a word", key_node.start_mark, "write 'key: value', the key in quotes")
            if key_node.tag == _TAG + "merge":
                continue
            if key_node.tag == _TAG + "bool" and key.lower() in SafeConstructor.bool_values:  # on: is a word as well
                key_node.tag = _TAG + "str"
            key_node.value = ALIASES.get((*path, key), key)
            key = key_node.value
            yield (*path, key), line, first_lines.get(key)
            first_lines.setdefault(key, line)
            yield from _walk(value_node, (*path, key), ancestors)
    elif isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            yield (*path, index), entry.start_mark.line + 1, None
            yield from _walk(entry, (*path, index), ancestors)


def _apply_override(tree: Any, override: str, merged: Merged) -> None:
    name, equals, text = override.partition("=")
    keys = [int(key) if key.isdecimal() else key for key in name.strip().split(".")]
    keys[-1] = ALIASES.get(tuple(keys), keys[-1])
    source = f"command line: {shortened(override)}"
    cure = "write section.key=value, for example args.seed=7; list entries are numbered from 0"
    try:
        override.encode()
    except UnicodeEncodeError:
        text_only = "write it in UTF-8; for a file of another name, give that of a link to it"
        merged.add((), "is not UTF-8 text", text_only, source=source)
        return
    if not equals or not 2 <= len(keys) <= MAX_DEPTH or "" in keys:
        home = place_of(name, name) if len(keys) == 1 else None
        merged.add((), "not an override", f"write {home}=..." if home else cure, source=source)
        return
    try:
        value = _sentence(text, tuple(keys)) if tuple(keys) in _SENTENCES else override_value(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None)
        found = f"the value {shortened(text)} is not YAML{f': {problem}' if problem else ''}"
        merged.add(tuple(keys), found, "put text with : [ ] { } # in quotes", source=source)
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
        container[keys[-1]] = _merge(container.get(keys[-1]), value)
    else:
        merged.add(tuple(keys), "does not exist in the configuration", cure, source=source)
        return
    merged.origins[tuple(keys)] = source


def override(key: str, value: Any) -> str:
    """Return ``key=value`` of a value as it is: nothing in it is a reference, or means anything to YAML."""
    text = json.dumps(escaped(value), ensure_ascii=False)
    text = _NOT_IN_YAML.sub(lambda found: json.dumps(found[0])[1:-1], text)
    return f"{key}={text}"


# Characters that YAML refuses, or takes for line breaks.
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def override_value(text: str) -> Any:
    """Return the value of an override: as YAML, but text exactly as typed, without YAML's comments and folding.

    Raises:
        YAMLError: it is no YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:  # nothing but a comment
            return text if text.strip() else None
        is_plain = isinstance(node, yaml.ScalarNode) and not node.style
        rest = text[node.end_mark.index :].strip()
        if is_plain and (rest or node.tag == _TAG + "str"):
            return text
        if rest:
            raise yaml.MarkedYAMLError(problem=f"'{rest}' would be a comment")
        for _ in _walk(node, (), ()):
            pass  # refuses aliases in circles
        return _merge(None, loader.construct_document(node))
    finally:
        loader.dispose()


def _sentence(text: str, path: KeyPath) -> str | None:
    """Return the value of an override that is a sentence: as typed, whatever it would be in YAML, or null."""
    try:
        value = override_value(text)
    except yaml.YAMLError:
        return text
    if value is None and not text and path == _PROMPT:
        return text  # an empty variable of the shell, not the wish for no prompt; it is refused
    return value if isinstance(value, str | None) else text


def _child(container: Any, key: str | int) -> Any:
    """Return the entry of a mapping or list, or None."""
    if isinstance(container, dict):
        return container.get(key)
    if isinstance(container, list) and isinstance(key, int) and key < len(container):
        return container[key]
    return None
