import json
from pathlib import Path
from typing import get_args

import low_memory
import pytest

from sgm.weights.quantize import Storage

ROOT = Path(__file__).parents[3]
FOUND = json.loads((ROOT / "assets/toy/low_memory.json").read_text())


@pytest.mark.parametrize("storage", get_args(Storage))
def test_the_recorded_samples_are_as_good_as_without_and_the_page_shows_it(storage):
    found, plain = FOUND[storage], FOUND["as released"]
    assert found["samples"] == plain["samples"] >= 12
    for name in ("colour", "shape", "direction", "size", "everything"):
        assert found[name] >= plain[name] - 2 / found["samples"], name
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    assert f"| {found['everything']:.0%} | {found['psnr_db']:.1f} dB |" in page.partition(f"\n| `{storage}` |")[2][:99]


def test_the_recorded_tiles_are_close_and_the_page_shows_it():
    found = FOUND["tiles"]
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    assert found["least_psnr_db"] > 20 and f"{found['psnr_db']:.1f} dB" in page and "as released" in FOUND


@pytest.mark.thorough
def test_samples_are_judged_beside_those_of_the_plain_weights(monkeypatch):
    monkeypatch.chdir(ROOT)
    plain, small = (low_memory.sampled(storage, 1, num_steps=2) for storage in (None, "int8"))
    found = low_memory.compared(small, plain)
    assert 20 < found["least_psnr_db"] == found["psnr_db"] < 100 and found["samples"] == 1
    assert "psnr_db" not in low_memory.compared(plain, plain)


@pytest.mark.thorough
def test_tiles_are_measured_on_frames_that_are_larger_than_a_tile(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert 20 < low_memory.tiles(1, magnified=(5, 5))["psnr_db"] < 100
