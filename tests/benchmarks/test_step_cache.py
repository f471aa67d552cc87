"""What is skipped on the toy, and how near its videos are."""

import re

import pytest
import quality

from benchmarks import step_cache

BLOCKS, PSNR = 0.6, 30  # at most so many blocks are run, and videos are at least so near


def recorded(model: str, speed: str) -> re.Match:
    """Return share, PSNR and the shares of right colours, shapes and directions, as docs/speed.md has them."""
    text = (step_cache.ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    (row,) = re.finditer(rf"^\| {model} \| `{speed}` \| (\d+)% \| \S+ \| ([\d.]+) dB .*\| ([\d%, ]+) \|$", text, re.M)
    return row


@pytest.mark.thorough
def test_the_fast_preset_meets_its_bar(monkeypatch):
    monkeypatch.chdir(step_cache.ROOT)
    for model in ("toy", "toy_i2v"):  # of 24 clips, by the command of that page
        share, near, right = recorded(model, "fast").groups()
        assert int(share) <= 100 * BLOCKS and float(near) >= PSNR and right == "100%, 100%, 100%"
    exact, fast = step_cache.measure("toy", quality.held_out_clips(1), ("exact", "fast"))
    assert exact.share_run == 1 and exact.psnr == float("inf")
    assert fast.share_run <= BLOCKS and fast.psnr >= PSNR, fast
    assert fast.quality == exact.quality
