"""Figures of docs/memory.md about sampling: one row measured, all of them within the cards."""

import re

import pytest

from benchmarks.sampling_memory import MODELS, PRESETS, row
from sgm.config.load import load_config
from tests.processes import ROOT

DOCUMENT = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
TOY = (ROOT / "configs" / "toy.yaml", ROOT / "configs" / "toy_inference.yaml")
ROW = re.compile(r"\| `(\w+)` \| (\S+) \| (\S+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|")


def test_a_row_of_the_document_is_what_is_measured():
    text, network, beside = row("8gb", "cogvideox_2b")
    assert f"| `8gb` | cogvideox_2b | 49×480×720 | {text:.1f} | {network:.1f} | {beside:.1f} |" in DOCUMENT


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_models_fit_into_nine_tenths_of_the_card(preset):
    path = ROOT / "configs" / "memory" / f"{preset}.yaml"
    args = load_config([*TOY, path], mode="inference").args
    assert ", exact: " in path.read_text().splitlines()[0] and args.weights is args.text_encoder_weights is None
    rows = [found.groups() for found in ROW.finditer(DOCUMENT)]
    assert [(name, model) for name, model, *_ in rows] == [(name, model) for name in PRESETS for model in MODELS]
    for name, model, size, *phases in rows:
        if name == preset and size == "49×480×720":
            assert max(map(float, phases)) <= 0.9 * int(preset.removesuffix("gb")), model
