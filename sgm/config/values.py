"""Check YAML values against type annotations, with pydantic, and describe the accepted values."""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import Field, PydanticUserError, TypeAdapter, ValidationError

# What a parameter takes. Upper bounds are far above what can be meant, and below what would hang.
AtLeast0 = Annotated[int, Field(ge=0, le=10**12)]
AtLeast1 = Annotated[int, Field(ge=1, le=10**12)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]  # of a layer or picture
PatchSide = Annotated[int, Field(ge=1, le=64)]  # in latent pixels or latent frames
Depth = Annotated[int, Field(ge=1, le=1000)]  # layers
Frames = Annotated[int, Field(ge=1, le=100_000)]
RotaryBase = Annotated[float, Field(ge=10, le=1e9)]  # of the wavelengths
SNR = Annotated[float, Field(ge=0.001, le=10_000)]  # signal-to-noise ratio; that of the first timestep is about 1,000
Name = Annotated[str, Field(min_length=1)]

_LARGE = 1e9  # of bounds that are written with an exponent
_UPPER_LARGE = re.compile(r" and (?:at most|below) \S+e\+\d+")
_WORDS = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text"}


def misfit(value: Any, hint: Any) -> tuple[str, str] | None:
    """Return what was found and the fix for a `value` that does not match `hint`; None if it matches.

    The rules are pydantic's strict rules for JSON: lists match tuples and sequences, integers match floats, booleans
    are not numbers, and text is not converted. An annotation without JSON schema, such as a class, matches anything.
    """
    try:
        hash(hint)
    except TypeError:  # metadata of an annotation may be anything
        adapter, schema = _adapter.__wrapped__(hint, "")
    else:
        adapter, schema = _adapter(hint, repr(hint))  # unions are equal in any order, and described in their own
    if adapter is None:
        return None
    try:
        adapter.validate_json(_as_json(value), strict=True)
    except ValidationError:
        if isinstance(value, dict) and list(value.values()) == [None]:  # how YAML parses unquoted {your path}
            return f"still holds a placeholder: {{{next(iter(value))}}}", "put the real value there"
        words = _in_words(schema, schema.get("$defs", {}))
        takes_text = any(word.startswith("text") for word in words.split(" or ")) and not isinstance(value, str)
        quoting = "; text that YAML reads as something else needs quotes" if takes_text else ""
        return f"is {spelled(value)}", f"give {words}{quoting}"
    return None


def words_for(hint: Any) -> str:
    """Describe the values that an annotation accepts; empty for one without JSON schema.

    Without upper bounds far above what can be meant, which only messages about such values name.
    """
    schema = _adapter(hint, repr(hint))[1]
    return _UPPER_LARGE.sub("", _in_words(schema, schema.get("$defs", {}))) if schema else ""


@cache
def _adapter(hint: Any, spelling: str) -> tuple[TypeAdapter[Any] | None, dict[str, Any]]:
    """Return the validator of an annotation and its JSON schema; None if it has no schema."""
    try:
        adapter = TypeAdapter(hint)
        return adapter, adapter.json_schema()
    except (PydanticUserError, TypeError, ValueError):
        return None, {}


def spelled(value: Any, most: int = 100) -> str:
    """Return a value as YAML would spell it, for a message; what is long is shortened in the middle."""
    return shortened(
        repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), most
    )


def shortened(text: str, most: int = 100) -> str:
    """Return `text` for a message, its middle left out where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _as_json(value: Any) -> str:
    # A date, which JSON lacks, must not match text.
    return json.dumps(value, skipkeys=True, default=lambda other: {str(other): None})


def _in_words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Describe the values accepted by a JSON schema, for an error message."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_in_words(option, definitions) for option in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        options = dict.fromkeys(schema.get("enum", [schema.get("const")]))
        return "one of " + ", ".join(option if isinstance(option, str) else json.dumps(option) for option in options)
    kind = schema.get("type")
    if kind == "object":
        values = schema.get("additionalProperties")
        each = f", each value {_in_words(values, definitions)}" if isinstance(values, dict) and values else ""
        return f"a mapping (indented keys){each}"
    if "prefixItems" in schema:
        entries = [_in_words(entry, definitions) for entry in schema["prefixItems"]]
        each = f", each {entries[0]}" if len(set(entries)) == 1 else f": {', then '.join(entries)}"
        return f"a list of {len(entries)}{each}"
    if kind == "array":
        entry = f", each entry {_in_words(schema['items'], definitions)}" if schema.get("items") else ""
        return f"a list{' that is not empty' if schema.get('minItems') else ''}{entry}"
    if kind == "string" and schema.get("pattern"):
        return schema.get("description", "text")
    if schema.get("format") == "path":
        return "a path"
    if kind == "string" and schema.get("minLength"):
        return "text that is not empty"
    return _WORDS.get(str(kind), str(kind)) + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    least, above, most, below = map(schema.get, ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"))
    if least is not None and most is not None and most < _LARGE:
        return f" from {least:,} to {most:,}"
    words = {"of at least": least, "above": above, "and at most": most, "and below": below}
    found = {word: bound for word, bound in words.items() if bound is not None}
    return "".join(f" {word} {f'{bound:g}' if bound >= _LARGE else f'{bound:,}'}" for word, bound in found.items())
