"""Replace references: ``${section.key}`` in a value stands for the value of that key.

Only values of the configuration can be referred to: there are no functions, and nothing of the environment is read.
The result is bounded, since references to references multiply.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

KeyPath = tuple[str | int, ...]

MAX_VALUES = 20_000  # of a configuration; the largest shipped ones have about 400
MAX_CHAIN = 32  # references that refer to each other
MAX_TEXT = 1_000_000  # characters put together from references

_REFERENCE = re.compile(r"(\\?)\$\{([^{}]*)\}")
_FORM = "write ${section.key} with the whole path of a key that one of the files sets, or \\${ for these characters"


class BadReferenceError(Exception):
    """A reference that stands for nothing: where it is, what is wrong, and the cure."""

    def __init__(self, path: KeyPath, found: str, cure: str = _FORM) -> None:
        super().__init__(found)
        self.path, self.found, self.cure = path, found, cure


def resolve(tree: Any) -> Any:
    """Return a copy of a tree of mappings, lists and scalars with every reference replaced.

    A value that is one reference becomes a copy of what it names, with its type; within text it becomes text.

    Raises:
        BadReferenceError: a reference names no value, or itself, or they multiply without bounds.
    """
    return _Resolver(tree).resolved((), tree)


def escaped(tree: Any) -> Any:
    """Return a copy of a tree without references that `resolve` gives back unchanged."""
    if isinstance(tree, dict):
        return {key: escaped(entry) for key, entry in tree.items()}
    if isinstance(tree, list | tuple):
        return [escaped(entry) for entry in tree]
    return tree.replace("${", "\\${") if isinstance(tree, str) else tree


class _Resolver:
    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.known: dict[KeyPath, Any] = {}  # path of a text with references → its value
        self.chain: list[KeyPath] = []
        self.num_values = self.num_characters = 0

    def resolved(self, path: KeyPath, value: Any) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise BadReferenceError(path, f"the configuration has more than {MAX_VALUES:,} values", "shorten it")
        if isinstance(value, dict):
            return {key: self.resolved((*path, key), entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.resolved((*path, index), entry) for index, entry in enumerate(value)]
        return self.text(path, value) if isinstance(value, str) and "${" in value else value

    def text(self, path: KeyPath, text: str) -> Any:
        """Return the value of a text with references."""
        if path not in self.known:
            if path in self.chain:
                names = " -> ".join(".".join(map(str, step)) for step in (*self.chain[self.chain.index(path) :], path))
                raise BadReferenceError(path, f"refers to itself: {names}", "give the value in one of these places")
            if len(self.chain) == MAX_CHAIN:
                raise BadReferenceError(path, f"references follow each other more than {MAX_CHAIN} times")
            self.chain.append(path)
            whole = _REFERENCE.fullmatch(text)
            if whole is not None and not whole[1]:
                self.known[path] = self.named(path, whole[2])
            else:
                self.known[path] = "".join(self.pieces(path, text))
            self.chain.pop()
        return self.copied(path, self.known[path])

    def copied(self, path: KeyPath, value: Any) -> Any:
        """Return a copy, which counts as much as what it is made from."""
        self.num_values += sum(1 for _ in _values(value))
        if self.num_values > MAX_VALUES:
            raise BadReferenceError(path, f"with its references, the configuration has more than {MAX_VALUES:,} values")
        return copy.deepcopy(value)

    def pieces(self, path: KeyPath, text: str) -> Iterator[str]:
        end = 0
        for match in _REFERENCE.finditer(text):
            yield self.literal(path, text[end : match.start()])
            if match[1]:
                yield match[0][1:]
            else:
                value = self.named(path, match[2])
                if isinstance(value, dict | list):
                    raise BadReferenceError(
                        path, f"'{match[0]}' is a section or a list, which cannot be part of a text"
                    )
                piece = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
                self.num_characters += len(piece)
                if self.num_characters > MAX_TEXT:
                    raise BadReferenceError(path, f"references make a text of more than {MAX_TEXT:,} characters")
                yield piece
            end = match.end()
        yield self.literal(path, text[end:])

    def literal(self, path: KeyPath, text: str) -> str:
        if "${" in text.replace("\\${", ""):
            raise BadReferenceError(path, f"'{text}' begins a reference and does not end it")
        return text.replace("\\${", "${")

    def named(self, path: KeyPath, name: str) -> Any:
        """Return the value that a reference in the text at `path` names."""
        if ":" in name:
            resolver = name.partition(":")[0]
            found = f"'${{{name}}}' calls the resolver '{resolver}', and a file can only refer to values"
            raise BadReferenceError(path, found, "write the value itself, or give it on the command line")
        value: Any = self.tree
        place, is_raw = (), True
        for word in name.strip().split("."):
            holder: Any = dict(enumerate(value)) if isinstance(value, list) else value
            key = int(word) if isinstance(value, list) and word.isdecimal() else word
            if not isinstance(holder, dict) or key not in holder:
                raise BadReferenceError(path, f"'${{{name}}}' names no value: there is no '{word}'")
            value, place = holder[key], (*place, key)
            if is_raw and isinstance(value, str) and "${" in value:
                value, is_raw = self.text(place, value), False
        return self.resolved(place, value) if is_raw else value


def _values(value: Any) -> Iterator[Any]:
    yield value
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for entry in entries:
        yield from _values(entry)
