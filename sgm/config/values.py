"""Check YAML values against type annotations, with pydantic, and describe the accepted values."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

_WORDS = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text"}


def misfit(value: Any, hint: Any) -> tuple[str, str] | None:
    """Return what was found and the fix for a `value` that does not match `hint`; None if it matches.

    The rules are pydantic's strict rules for JSON: lists match tuples and sequences, integers match floats, booleans
    are not numbers, and text is not converted. An annotation without JSON schema, such as a class, matches anything.
    """
    try:
        adapter = TypeAdapter(hint)
        schema = adapter.json_schema()
    except (PydanticUserError, TypeError, ValueError):
        return None
    try:
        adapter.validate_json(_as_json(value), strict=True)
    except ValidationError:
        if isinstance(value, dict) and list(value.values()) == [None]:  # how YAML parses unquoted {your path}
            return f"still holds a placeholder: {{{next(iter(value))}}}", "put the real value there"
        words = _in_words(schema, schema.get("$defs", {}))
        quoting = "; text that YAML reads as something else needs quotes" if "text" in words.split(" or ") else ""
        return f"is {value!r}", f"give {words}{quoting}"
    return None


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
        return "a mapping (indented keys)"
    if "prefixItems" in schema:
        entries = schema["prefixItems"]
        return f"a list of {len(entries)}, each {_in_words(entries[0], definitions)}"
    if kind == "array":
        return f"a list, each entry {_in_words(schema['items'], definitions)}" if schema.get("items") else "a list"
    if schema.get("format") == "path":
        return "a path"
    return _WORDS.get(str(kind), str(kind)) + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    least, above, most = map(schema.get, ("minimum", "exclusiveMinimum", "maximum"))
    if least is not None:
        return f" of at least {least:g}" if most is None else f" from {least:g} to {most:g}"
    return "" if above is None else f" above {above:g}"
