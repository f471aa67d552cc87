"""The toy model as a newcomer runs it: within a laptop's memory, and with a checked configuration."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "sample_video.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("model", ["toy", pytest.param("toy_i2v", marks=pytest.mark.slow)])
def test_peak_memory(model, tmp_path):
    done = run("--base", f"configs/{model}.yaml", "configs/toy_inference.yaml", f"args.output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    sidecars = [json.loads(path.read_text()) for path in tmp_path.rglob("000000.json")]
    prompts = (ROOT / "assets/toy" / ("prompts.txt" if model == "toy" else "prompts_i2v.txt")).read_text().splitlines()
    assert len(sidecars) == len(prompts)
    assert max(sidecar["peak_memory_bytes"] for sidecar in sidecars) <= 1.5e9
    assert f"contact sheet: {tmp_path / 'contact_sheet.png'}" in done.stderr.splitlines()[-1]


def test_check_reads_no_weights_and_reports_the_run(tmp_path):
    done = run("--base", "configs/toy.yaml", "configs/toy_inference.yaml", "--check", f"args.output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for part in ("parameters", "17 frames", "64x64", "legal frames", "legal sizes", "float32 on", "prompts: 6"):
        assert part in done.stdout.replace("fp32 on", "float32 on"), done.stdout
    assert "loaded" not in done.stderr
