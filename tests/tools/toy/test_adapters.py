import json
from pathlib import Path

import adapters
import concept
import pytest

ROOT = Path(__file__).parents[3]
FOUND = json.loads((ROOT / "assets/toy/adapters.json").read_text(encoding="utf-8"))

KINDS = {  # run → the first cells of its row
    "rslora": "rsLoRA, all targets | [everything.yaml](../configs/lora/everything.yaml)",
    "dora": "DoRA | [dora.yaml](../configs/lora/dora.yaml)",
    "lokr": "LoKr, `factor: 4` | [lokr.yaml](../configs/lora/lokr.yaml)",
    "lokr_root": "LoKr, `factor: -1` | the same",
}


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


def learned(found: dict) -> None:
    """Land where it was asked for alone, and colours and shapes as before."""
    for name, own in found.items():
        smallest = name == "lokr_root"
        assert own["land"] >= (0.4 if smallest else concept.LEARNED) and own["unasked"] <= (0.1 if smallest else 0)
        assert own["colour"] == 1 and own["shape"] >= 0.8, "one of five may be another"


def test_all_kinds_learn_land_as_their_exported_files_show_and_so_does_the_page():
    text = section("The kinds on the toy")
    assert list(FOUND["kinds"]) == list(adapters.KINDS) == list(KINDS)
    learned(FOUND["kinds"])
    for name, own in FOUND["kinds"].items():
        shares = " | ".join(f"{own[key]:.0%}" for key in ("land", "unasked", "colour", "shape"))
        assert f"| {KINDS[name]} | {own['numbers']:,} | {own['style']} | {shares} |" in text


def test_averages_of_checkpoints_are_as_good_as_those_and_the_page_shows_them():
    found, text = FOUND["soups"], section("Merge and extract")
    assert list(found) == ["200", "250", "300", "average", "moving average"]
    least = min(found[name]["land"] for name in ("200", "250", "300"))
    assert all(found[name]["land"] >= least for name in ("average", "moving average"))
    for name, own in found.items():
        assert own["unasked"] == 0 and own["colour"] == 1
        row = f"iteration {name}" if name.isdecimal() else name
        assert f"| {row} | {own['land']:.0%} | {own['unasked']:.0%} | {own['shape']:.0%} |" in text


def test_two_loras_at_once_are_both_seen_and_the_page_shows_it():
    found, text = FOUND["several"], section("Several at once")
    assert found["land"]["land"] >= concept.LEARNED and found["land"]["big"] == 0
    assert found["big"]["land"] <= 0.01 and found["big"]["big"] >= 0.9
    assert found["both"]["land"] >= 0.6 and found["both"]["big"] >= 0.9
    for name, own in found.items():
        assert own["unasked"] == 0 and own["colour"] >= 0.8
        assert f"| {name} | {' | '.join(f'{own[key]:.0%}' for key in ('land', 'big', 'colour', 'shape'))} |" in text


@pytest.mark.thorough
def test_what_the_shipped_lora_adds_is_extracted_from_the_full_models(tmp_path, monkeypatch):
    """The smaller the rank, the less; without sampling."""

    def made(folder, word):
        return {"files": sum(file.is_file() for file in Path(word.partition("=")[2]).rglob("*"))}

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(adapters, "sampled", made)
    found = adapters.extracted(tmp_path)
    assert {rank: own["held"] for rank, own in found.items()} == {
        rank: pytest.approx(own["held"], abs=0.002) for rank, own in FOUND["extracted"].items()
    }
    assert all(own["files"] >= 1 for own in found.values())


@pytest.mark.slow  # about fifteen minutes of CPU time
def test_the_kinds_learn_land(tmp_path, monkeypatch):
    """The command in docs/adapters.md."""
    monkeypatch.chdir(ROOT)
    learned(adapters.kinds(tmp_path))
