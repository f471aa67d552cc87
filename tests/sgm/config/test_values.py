import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field

from sgm.config.values import Share, misfit, spelled

DATE = datetime.date(2026, 1, 31)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, float),
        (float("inf"), float),
        (10**30, int),
        ([1, 2], tuple[int, int]),
        ([1], list[int] | None),
        (["a"], Sequence[str]),
        ([], tuple[str, ...]),
        (None, int | None),
        ("x", Path),
        ({"a": 1}, dict[str, int]),
        ({13: "x"}, Mapping[int, str]),
        ("b", Literal["a", "b"]),
        (0, Annotated[int, Field(ge=0)]),
        (DATE, Any),
        (3, Annotated[int, {"unit": "pixels"}]),
    ],
)
def test_fitting_values(value, hint):
    assert misfit(value, hint) is None


WITHOUT_SCHEMA = Annotated[int, Field(json_schema_extra={"of": print})]


@pytest.mark.parametrize(
    "hint", [torch.dtype, torch.nn.Module | None, Callable[[int], int], object, "NoSuchName", WITHOUT_SCHEMA]
)
def test_what_yaml_cannot_spell_fits_anything(hint):
    assert misfit("relu", hint) is None


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (True, int, "a whole number"),
        (True, float, "a number"),
        (1, bool, "true or false"),
        (1.0, int, "a whole number"),
        ("1", int, "a whole number"),
        (1, str, "text; text that YAML reads as something else needs quotes"),
        (DATE, str, "text; text that YAML reads as something else needs quotes"),
        (1, Path, "a path"),
        ([1, 2, 3], tuple[int, int], "a list of 2, each a whole number"),
        ([1, "a"], tuple[int, ...], "a list, each entry a whole number"),
        ("ab", Sequence[str], "a list, each entry text"),
        (1, list, "a list"),
        ([2, "a"], tuple[Share, int], "a list of 2: a number from 0 to 1, then a whole number"),
        ("a", dict, "a mapping (indented keys)"),
        ({"a": "b"}, dict[str, int], "a mapping (indented keys), each value a whole number"),
        ("c", Literal["a", "b"], "one of a, b"),
        ("c", Literal["a"] | None, "one of a or null"),
        ("c", Literal["a", True, None], "one of a, true, null"),
        (0, Annotated[int, Field(ge=1)] | None, "a whole number of at least 1 or null"),
        (2, Annotated[float, Field(ge=0, le=1)], "a number from 0 to 1"),
        (0, Annotated[float, Field(gt=0)], "a number above 0"),
        ([0, 8], tuple[Annotated[int, Field(ge=1)], ...], "a list, each entry a whole number of at least 1"),
    ],
)
def test_misfits_are_described_in_words(value, hint, words):
    assert misfit(value, hint) == (f"is {spelled(value)}", f"give {words}")


def test_braces_without_quotes_are_a_placeholder():
    found, cure = misfit({"your path": None}, str)
    assert found == "still holds a placeholder: {your path}" and cure == "put the real value there"
