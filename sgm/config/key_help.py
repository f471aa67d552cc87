"""What each key of a configuration means, for ``--help`` of the scripts; without heavy imports.

The texts are in ``keys.json``, which tools/key_table.py writes from the typed arguments, the signatures and docstrings
of classes, and the tables of docs/configuration.md.
"""

import difflib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("keys.json")
SECTIONS = ("args", "model", "data", "deepspeed")
_TRAINING = ("data", "deepspeed")  # sections that sampling does not read
_MOST = 8  # keys that are explained at a time; the names of more are listed
_NARROWEST = 100  # columns of a line


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
        type: what it takes, in words.
        default: as YAML spells it; ``required`` without one.
        text: what it means.
        training: whether only training reads it.
    """

    type: str
    default: str
    text: str
    training: bool = False


@cache
def keys() -> Mapping[str, Key]:
    """Return dotted key → its description, in the order of the sections."""
    return {name: Key(**entry) for name, entry in json.loads(FILE.read_text(encoding="utf-8")).items()}


def listed(*, training: bool) -> str:
    """Return a line for every key that a command reads, below the beginning that it shares with others."""
    return "\n".join(["keys (--help KEY explains one, or a section):", *_lines(_read_by(training))])


def explained(asked: str) -> str | None:
    """Return what there is to say about a key, its end, or the beginning of several; None if there is none."""
    known = keys()
    found = [name for name in known if name == asked] or [name for name in known if name.endswith(f".{asked}")]
    below = [name for name in known if f".{asked}." in f".{name}"]
    if 0 < len(found) <= _MOST:
        return "\n\n".join(_paragraph(name, known[name]) for name in found)
    return "\n".join(_lines({name: known[name] for name in found or below})) or None


def nearest(asked: str) -> list[str]:
    """Return keys with names like `asked`."""
    ends = {name.rpartition(".")[2]: name for name in reversed([*keys()])}
    close = difflib.get_close_matches(asked.rpartition(".")[2], ends, n=3, cutoff=0.6)
    return [ends[name] for name in close]


def completed(word: str, *, training: bool) -> list[str]:
    """Return the arguments that a word may become: keys, or values of its key that are words; see `sgm.cli`."""
    name, equals, value = word.partition("=")
    if not equals:
        return [f"{key}=" for key in _read_by(training) if word and key.startswith(word)]
    kind = keys()[name].type if name in keys() else ""
    values = kind.removeprefix("one of ").removesuffix(" or null").split(", ") if kind.startswith("one of ") else []
    values += ["true", "false"] if "true or false" in kind else []
    values += ["null"] if kind.endswith(" or null") else []
    return [f"{name}={each}" for each in values if each.startswith(value)]


def asked_key(words: Sequence[str]) -> str | None:
    """Return the key after ``--help`` on a command line; None without ``--help`` or without a key."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--help="):
            return word.partition("=")[2].partition("=")[0] or None
        if word in ("-h", "--help"):
            is_key = following and not following.startswith("-") and not following.endswith((".yaml", ".yml"))
            return following.partition("=")[0] if is_key else None
    return None


def _read_by(training: bool) -> dict[str, Key]:
    return {
        name: key
        for name, key in keys().items()
        if training or not (key.training or name.partition(".")[0] in _TRAINING)
    }


def _first_sentence(text: str) -> str:
    return re.split(r"(?<! et al)\. ", text)[0].rstrip(".")


def _lines(chosen: Mapping[str, Key]) -> Iterator[str]:
    """Yield a line for each key, cut to the width of a terminal; elsewhere whole, to be searched."""
    width = max(_NARROWEST, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    above = ""
    for name, key in chosen.items():
        parent, _, last = name.rpartition(".")
        if parent != above:
            above = parent
            yield f"{parent}:"
        default = " (required)" if key.default == "required" else f" = {key.default}" if key.default else ""
        takes = f" [{key.type}]" if key.type else ""
        line = f"  {last}{default}: {_first_sentence(key.text) or 'see its class'}{takes}"
        yield line if width is None or len(line) <= width else f"{line[: width - 3]}..."


def _paragraph(name: str, key: Key) -> str:
    lines = [f"{name}{' (training)' if key.training else ''}", f"  {key.text}"] if key.text else [name]
    lines += [f"  takes: {key.type}"] if key.type else []
    return "\n".join([*lines, f"  default: {key.default}", f"  on the command line: {name}=VALUE"])
