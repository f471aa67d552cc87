"""Files for the tests of the configuration."""

from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "extra.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
