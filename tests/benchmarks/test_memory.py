"""The VAE's memory at released sizes, and the table of docs/memory.md."""

import pytest

from benchmarks import memory
from tests.processes import ROOT

DOCUMENT = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
SMALL, LARGE = "cogvideox_5b", "cogvideox1.5_5b"
# Bars in GiB: above the figures, below what cards of 8, 16 and 24 GB have left.
CASES = [
    ("VAE encode", SMALL, "whole clip", 9.5),
    ("VAE decode", SMALL, "whole frames", 5.0),
    pytest.param("VAE encode", SMALL, "`encode_chunk: 8`", 4.0, marks=pytest.mark.slow),
    pytest.param("VAE decode", SMALL, "`vae_tiling: true`", 5.0, marks=pytest.mark.slow),
    pytest.param("VAE encode", LARGE, "whole clip", 45.0, marks=pytest.mark.slow),
    pytest.param("VAE encode", LARGE, "`encode_chunk: 8`", 12.0, marks=pytest.mark.slow),
    pytest.param("VAE decode", LARGE, "whole frames", 15.0, marks=pytest.mark.slow),
    pytest.param("VAE decode", LARGE, "`vae_tiling: true`", 5.0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("phase", "model", "how", "bar"), CASES)
def test_the_vae_stays_below_its_bar_and_the_document_says_how_much_it_takes(phase, model, how, bar):
    settings = memory.ENCODE if phase == "VAE encode" else memory.DECODE
    attributes, tiled, effect = settings[how]
    clip = memory.CLIPS[model]
    weights, peak = memory.vae_peak(phase, model, clip, attributes, tiled=tiled)
    assert peak <= bar * memory.GIB
    assert memory.shown(memory.Row(phase, model, clip, how, effect, weights, peak)) in DOCUMENT


def test_the_document_has_a_row_for_every_setting():
    rows = [line for line in DOCUMENT.splitlines() if line.startswith(("| VAE encode |", "| VAE decode |"))]
    assert len(rows) == len(CASES) == 2 * (len(memory.ENCODE) + len(memory.DECODE))
