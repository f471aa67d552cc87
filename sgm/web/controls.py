"""The controls of the page, made from the typed arguments of sampling, and the overrides that their values mean.

Type, limits, choices and default of a control come from the annotation of its key in `SamplingArgs`; its words are in
`sgm.web.words`. Values are checked by the same rules as those in YAML, with the same messages.
"""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from sgm.config.args import LoraArgs, SamplingArgs
from sgm.config.values import misfit
from sgm.config.yaml_files import override
from sgm.util import InputError

# The keys of `args` on the page, in this order: always shown, and under "more".
BASIC = "prompt negative_prompt sampling_image_size sampling_num_frames num_steps guidance_scale seed".split()
MORE = (
    "guidance_interval time_scaling time_window time_window_overlap loop step_cache step_cache_threshold weights "
    "text_encoder_weights attention vae_tiling compile allow_unknown_text"
).split()

Kind = Literal["text", "whole", "number", "switch", "choice", "pair"]
_KINDS: dict[str, Kind] = {
    "string": "text",
    "integer": "whole",
    "number": "number",
    "boolean": "switch",
    "array": "pair",
}


@dataclass(frozen=True)
class Control:
    """One key of ``args`` as a control.

    Attributes:
        name: the key.
        kind: what is entered; a ``pair`` is two numbers.
        least: the smallest number, if there is one.
        most: the largest number, if there is one.
        whole: whether the numbers of a pair are whole.
        choices: of a ``choice``.
        default: of the key; None: what the model's file says.
    """

    name: str
    kind: Kind
    least: float | None = None
    most: float | None = None
    whole: bool = False
    choices: tuple[str, ...] = ()
    default: Any = None


_WORDS = {"true": True, "false": False}  # in a choice

_HINTS = typing.get_type_hints(SamplingArgs, include_extras=True)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingArgs)}


def control(name: str, hint: Any, default: Any) -> Control:
    """Return the control of a key with an annotation and a default."""
    schema = TypeAdapter(hint).json_schema()
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    schema = options[0]
    if len(options) > 1 and schema.get("type") == "boolean":  # true, false, or a word
        words = tuple(option["const"] for option in options[1:])
        return Control(name, "choice", choices=(*_WORDS, *words), default=None)
    choices = tuple(schema.get("enum", filter(None, [schema.get("const")])))
    if choices:
        return Control(name, "choice", choices=choices, default=default)
    number = schema["prefixItems"][0] if "prefixItems" in schema else schema
    return Control(
        name,
        _KINDS[schema["type"]],
        least=number.get("minimum"),
        most=number.get("maximum"),
        whole=number["type"] == "integer",
        default=default,
    )


CONTROLS = {name: control(name, _HINTS[name], _DEFAULTS[name]) for name in (*BASIC, *MORE)}
_STRENGTH = LoraArgs.model_fields["strength"]
STRENGTH = control("strength", _STRENGTH.annotation, _STRENGTH.default)  # of an entry of args.loras


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Return ``args.key=value`` for the values of controls; those left empty are as in the model's file.

    Raises:
        InputError: all values that do not fit, in the words that YAML files get.
    """
    given = {name: _typed(CONTROLS[name], value) for name, value in values.items()}
    if given.get("prompt") is None:
        raise InputError("args.prompt is empty; write what the video shows")
    # A switch that was not touched must not replace what a preset or the model's file says.
    unset = {name for name, value in given.items() if CONTROLS[name].kind == "switch" and value == _DEFAULTS[name]}
    given = {name: value for name, value in given.items() if value is not None and name not in unset}
    wrong = {name: found for name, value in given.items() if (found := misfit(value, _HINTS[name]))}
    if wrong:
        raise InputError("\n".join(f"args.{name} {found}; {cure}" for name, (found, cure) in wrong.items()))
    return [override(f"args.{name}", value) for name, value in given.items()]


def fits(name: str, value: Any) -> bool:
    """Whether a value may be that of a control's key."""
    return misfit(value, _HINTS[name]) is None


def loras_override(loras: Sequence[tuple[str, Any]]) -> list[str]:
    """Return the override of ``args.loras`` for paths with strengths, without which they have the default.

    Raises:
        InputError: a strength does not fit.
    """
    entries = []
    for index, (path, given) in enumerate(loras):
        strength = STRENGTH.default if number(given) is None else number(given)
        if found := misfit(strength, typing.get_args(_STRENGTH.annotation)[0]):
            raise InputError(f"args.loras.{index}.strength {found[0]}; {found[1]}")
        entries.append({"path": path, "strength": strength})
    return [override("args.loras", entries)] if entries else []


def _typed(control: Control, value: Any) -> Any:
    """Return the value of a control as YAML has it; None if it was left empty."""
    if control.kind == "pair":
        numbers = [number(entry) for entry in value or ()]
        return None if all(entry is None for entry in numbers) else numbers
    if control.kind == "text":
        return value if value is not None and not (isinstance(value, str) and not value.strip()) else None
    if control.kind == "choice":
        text = str(value).lower() if isinstance(value, bool) else str(value or "")
        return _WORDS.get(text, text) if text.strip() else None
    return value if control.kind == "switch" else number(value)


def number(value: Any) -> Any:
    """Return a number of the browser, where 7 may be 7.0 or text. Other text stays, for a message; empty is None."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value) if math.isfinite(float(value)) else value
        value = value if not isinstance(value, str) or value.strip() else None
    return int(value) if isinstance(value, float) and value.is_integer() else value
