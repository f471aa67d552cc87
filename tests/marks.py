"""What `make test` leaves to `make test-all`: further cases of what another test shows."""

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(*values: Any) -> Any:
    """Return a case of a parametrized test that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def only(chosen: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return `values` as cases of a parametrized test; `make test` runs the chosen ones."""
    chosen = [*chosen]
    values = [*values]
    assert all(value in values for value in chosen), "chosen values are among all"
    return [
        value if value in chosen else thorough(*(value if isinstance(value, tuple) else [value])) for value in values
    ]
