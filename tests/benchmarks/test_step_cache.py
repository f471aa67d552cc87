"""What is skipped on the toy, and how near its videos are."""

import quality

from benchmarks import step_cache


def test_the_fast_preset_meets_its_bar(monkeypatch):
    monkeypatch.chdir(step_cache.ROOT)
    exact, fast = step_cache.measure("toy", quality.held_out_clips(2), ("exact", "fast"))
    assert exact.share_run == 1 and exact.psnr == float("inf")
    assert fast.share_run <= 0.6 and fast.psnr >= 30, fast
    assert fast.quality == exact.quality
