"""Print what ``--help KEY`` says about the keys of a configuration, as JSON; ``--write`` puts it into its file.

    python tools/key_table.py --write

Types and defaults come from the typed arguments and the constructors of the classes that shipped files name, the texts
from the tables of docs/configuration.md and from docstrings. A test compares the file with what this prints.
"""

import argparse
import dataclasses
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sgm.config.args import SamplingArgs, TrainingArgs, names_of
from sgm.config.deepspeed_section import DEFAULTS, schema_of_section
from sgm.config.key_help import FILE, Key
from sgm.config.load import load_config
from sgm.config.targets import ENGINE_TARGET, accepted_by, is_model
from sgm.config.values import words_for
from sgm.io import atomic_file
from sgm.util import get_obj_from_str

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
# Together they name every part of a model.
EXAMPLE = ("configs/cogvideox_5b_i2v_lora.yaml", "configs/sft.yaml")
LORA = "model.network_config.params.modules.lora_config.params"
_BUILT = ("allocate", "data_dir", "store")  # parameters that no YAML file gives


def all_keys() -> dict[str, Key]:
    """Return dotted key → its description, section by section."""
    example = load_config([ROOT / name for name in EXAMPLE], mode="train").merged
    return {
        **dict(_args()),
        **dict(_params(get_obj_from_str(ENGINE_TARGET), example["model"], "model")),
        **dict(_adapters()),
        **dict(_params(get_obj_from_str("data_video.SFTDataset"), {}, "data.params")),
        **dict(_deepspeed()),
    }


def _args() -> Iterator[tuple[str, Key]]:
    """Yield the keys of the ``args`` section, those of sampling first."""
    texts = rows("\n## args, in training\n") | rows("\n## args\n")
    sampling = names_of(SamplingArgs)
    for entry in sorted(dataclasses.fields(TrainingArgs), key=lambda entry: entry.name not in sampling):
        cls = SamplingArgs if entry.name in sampling else TrainingArgs
        default, hint = getattr(cls, entry.name), typing.get_type_hints(cls, include_extras=True)[entry.name]
        spelled, text = texts[entry.name]
        shown = spelled if default in ((), None) else _spelled(default)
        yield f"args.{entry.name}", Key(words_for(hint), shown, text, training=entry.name not in sampling)


def _adapters() -> Iterator[tuple[str, Key]]:
    """Yield the keys of ``lora_config``, whose class is SAT's and has no docstring."""
    for name, (default, text) in rows("The section `lora_config`").items():
        yield f"{LORA}.{name}", Key("", default, text, training=True)


def _params(cls: Any, section: Mapping[str, Any], path: str) -> Iterator[tuple[str, Key]]:
    """Yield the parameters of a class and of the sections among them; of mixins, which get the rest, those given."""
    accepted, described = accepted_by(cls), docstring_of(cls)
    is_mixin = ".modules." in path
    if path.startswith(LORA) or accepted is None:
        return
    names = [name for name in accepted.hints if name not in _BUILT and (name in section or not is_mixin)]
    for name in names:
        yield f"{path}.{name}", Key(_words(accepted.hints[name]), _default(cls, name), described.get(name, ""))
    for name in names:
        yield from _below(section.get(name), getattr(cls, "SECTION_TYPES", {}).get(name), f"{path}.{name}")


def _below(value: Any, model: Any, path: str) -> Iterator[tuple[str, Key]]:
    """Yield the parameters of the sections in a value: a mapping or a list."""
    if model is not None:
        yield from _params(model, value or {}, path)
    elif isinstance(value, Mapping) and "target" in value:
        params = value.get("params") or {}
        yield from _params(get_obj_from_str(value["target"]), params, f"{path}.params")
    elif isinstance(value, Mapping | list):
        for key, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _below(entry, None, f"{path}.{key}")


def _deepspeed() -> Iterator[tuple[str, Key]]:
    """Yield the keys of the ``deepspeed`` section that the page names; types are those of DeepSpeed."""
    for name, (default, text) in rows("\n## deepspeed\n").items():
        model, hint = schema_of_section(), None
        for part in name.split("."):
            accepted = None if model is None else accepted_by(model)
            hint = None if accepted is None else accepted.hints.get(part)
            model = next(filter(is_model, (hint, *typing.get_args(hint))), None)
        shown = _spelled(DEFAULTS[name]) if name in DEFAULTS else default
        yield f"deepspeed.{name}", Key("" if hint is None or model else _words(hint), shown, text)


def _words(hint: Any) -> str:
    return "" if hint is Any else words_for(hint)


def _default(cls: Any, name: str) -> str:
    if is_model(cls):
        field = next(f for n, f in cls.model_fields.items() if name in (n, f.alias))
        return "required" if field.is_required() else _spelled(field.default)
    default = inspect.signature(cls).parameters[name].default
    return "required" if default is inspect.Parameter.empty else _spelled(default)


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def docstring_of(cls: Any) -> dict[str, str]:
    """Return parameter → its text, in the ``Args`` of the docstrings of a class and of those that it derives from."""
    texts = {}
    for base in reversed(inspect.getmro(cls)):
        for part in re.split(r"(?:Args|Attributes):\n", inspect.cleandoc(vars(base).get("__doc__") or ""))[1:]:
            listed = part.partition("\n\n")[0]
            found = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", listed, flags=re.MULTILINE | re.DOTALL)
            texts |= {name: " ".join(body.split()).replace("``", "`") for name, body in found}
    return texts


def rows(after: str) -> dict[str, tuple[str, str]]:
    """Return key → default and text, from the first table of the page after some words.

    A row may hold several keys: those after a colon are below the first one, and so are those that follow a dotted key.
    As many defaults, with commas between them, are one of each.
    """
    table = re.search(r"(?:^\|.*\n)+", PAGE.read_text(encoding="utf-8").partition(after)[2], flags=re.MULTILINE)
    assert table is not None, f"{PAGE} has no table after '{after}'"
    return dict(_rows_of(table[0]))


def _rows_of(table: str) -> Iterator[tuple[str, tuple[str, str]]]:
    for line in table.strip().splitlines()[2:]:
        first, default, text = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.findall(r"`([^`]+)`", first)
        above, colon, _ = first.partition("`: ")
        prefix = f"{above.strip('`')}." if colon else f"{names[0].rpartition('.')[0]}." if "." in names[0] else ""
        text = re.sub(r"\[([^\]]*)\]\(([^)#]*\.md)?[^)]*\)", _named, text)
        keys, default = names[1:] if colon else names, default.replace("`", "")
        each = re.split(r", (?![^\[]*\])", default)  # one of each key, if there are as many
        for key, own in zip(keys, each if len(each) == len(keys) else [default] * len(keys), strict=True):
            yield key if key.startswith(prefix) else prefix + key, (own, text)


def _named(link: re.Match[str]) -> str:
    """Return a link as text: the name of its page, beside other words for it."""
    page = f"docs/{link[2]}" if link[2] else "docs/configuration.md"
    return page if link[1] in (link[2], "") else f"{link[1]} ({page})"


def as_json() -> str:
    """Return the contents of the file: a line for each key."""
    lines = []
    for name, key in all_keys().items():
        entry = {field: value for field, value in dataclasses.asdict(key).items() if value is not False}
        lines.append(f"{json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}, which --help reads")
    options = parser.parse_args(argv)
    if not options.write:
        sys.stdout.write(as_json())
        return 0
    with atomic_file(FILE) as temporary:
        temporary.write_text(as_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
