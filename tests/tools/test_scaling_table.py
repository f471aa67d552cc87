"""The tables of docs/scaling.md are those of the model."""

import re
from pathlib import Path

import pytest

from tests.processes import ROOT
from tools import scaling_table

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
CURE = "run: python tools/scaling_table.py --write docs/scaling.md"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # so that it is put back


def test_the_assumptions_are_those_of_the_cards():
    assert scaling_table.put_into(PAGE, "cards", scaling_table.assumptions()) == PAGE, CURE


def test_a_row_of_the_page_is_that_of_the_model():
    found = scaling_table.column("2B", 8, alone=True)
    assert f"\n{scaling_table.best_row('2B', found, found)}\n" in PAGE, CURE
    (mesh,) = found.meshes
    (speed,) = re.findall(rf"^\| 2B \| {scaling_table.mesh_text(mesh)} \| ([^ ]+) \|", PAGE, flags=re.MULTILINE)
    assert speed == f"{found.meshes[mesh].speed:.3g}"


@pytest.mark.slow
def test_all_rows_of_the_page_are_those_of_the_model(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    assert scaling_table.main(["--write", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == PAGE, CURE


def test_the_page_has_each_model_number_and_mesh():
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (?:none|tokens|layers)", PAGE, flags=re.MULTILINE)
    assert rows == [(model, str(num)) for model in scaling_table.MODELS for num in scaling_table.DEVICES]
    for model in scaling_table.MODELS:
        assert len(re.findall(rf"^\| {re.escape(model)} \| (?:none|tokens|layers)", PAGE, flags=re.MULTILINE)) >= 5


def test_a_page_without_marks_is_refused(tmp_path, capsys):
    page = Path(tmp_path / "page.md")
    page.write_text("no marks")
    assert scaling_table.main(["--write", str(page)]) == 2
    assert "the page must hold the lines '<!-- cards: written by" in capsys.readouterr().err
