import json
from pathlib import Path

import adapters
import concept
import pytest

ROOT = Path(__file__).parents[3]
FOUND = json.loads((ROOT / "assets/toy/adapters.json").read_text(encoding="utf-8"))


def section(heading: str) -> str:
    page = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
    return page.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_more_strength_and_later_steps_put_more_land_and_the_page_shows_it():
    found = FOUND["strengths"]
    land = {name: shares["land"] for name, shares in found.items()}
    assert max(land["0"], land["first half"]) < 0.001 and land["1"] >= concept.LEARNED
    assert land["0"] <= land["0.5"] <= land["0.75"] <= land["1"] and land["second half"] > 0.3
    assert all(shares["unasked"] <= concept.UNKNOWN for shares in found.values())
    text = section("Several at once")
    for name, given in adapters.STRENGTHS.items():
        row = f"1, in the {name} of the steps: `{given['schedule']}`" if "schedule" in given else name
        row = f"`{row}`" if row.startswith("{") else row
        assert f"| {row} | {land[name]:.0%} |" in text


def test_an_extracted_lora_does_what_the_trained_one_did_and_the_page_shows_it():
    found = FOUND["extracted"]
    assert found["16"]["held"] >= 0.9999, "all of it, at the rank of the training"
    assert found["16"]["land"] == pytest.approx(FOUND["strengths"]["1"]["land"], abs=0.02)
    text = section("Merge and extract")
    for rank in adapters.RANKS:
        own = found[f"{rank}"]
        assert own["land"] >= concept.LEARNED and own["unasked"] == 0
        assert f"| {rank} | {own['held']:.0%} | {own['land']:.0%} | {own['unasked']:.0%} |" in text


def test_what_the_shipped_lora_adds_is_extracted_from_the_full_models(tmp_path, monkeypatch):
    """The smaller the rank, the less; without sampling."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(adapters, "sampled", lambda folder, path: {"files": sum(f.is_file() for f in path.rglob("*"))})
    found = adapters.extracted(tmp_path)
    assert {rank: own["held"] for rank, own in found.items()} == {
        rank: pytest.approx(own["held"], abs=0.002) for rank, own in FOUND["extracted"].items()
    }
    assert all(own["files"] >= 1 for own in found.values())
