"""The toy models with ``bash inference.sh``, within a laptop's memory."""

import json
from pathlib import Path

import pytest

from tests.processes import run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("model", "file"), [("toy", "prompts.txt"), ("toy_i2v", "prompts_i2v.txt")])
def test_each_prompt_is_sampled_within_a_laptops_memory(demo, model, file):
    sidecars = [json.loads(path.read_text()) for path in (demo / "outputs" / model).glob("*/0/000000.json")]
    lines = (ROOT / "assets" / "toy" / file).read_text(encoding="utf-8").splitlines()
    assert sorted(sidecar["prompt"] for sidecar in sidecars) == sorted(line.partition("@@")[0] for line in lines)
    assert all(bool(sidecar["image"]) is ("@@" in lines[0]) for sidecar in sidecars)
    assert max(sidecar["peak_memory_bytes"] for sidecar in sidecars) <= 1.5e9


def test_the_contact_sheets_are_named_last(demo):
    ends = [line for line in (demo / "messages.txt").read_text().splitlines() if "contact sheet: " in line]
    paths = [line.rpartition("contact sheet: ")[2] for line in ends]
    assert paths == [f"outputs/{model}/contact_sheet.png" for model in ("toy", "toy_i2v")]
    assert all((demo / path).is_file() for path in paths)


def test_check_reads_no_weights_and_reports_the_run(tmp_path):
    words = ["--base", "configs/toy.yaml", "configs/toy_inference.yaml", "--check", f"args.output_dir={tmp_path}"]
    done = run("sample_video.py", words)
    assert done.returncode == 0, done.stderr
    for part in ("parameters", "17 frames", "64x64", "legal frames", "legal sizes", "float32 on", "prompts: 6"):
        assert part in done.stdout.replace("fp32 on", "float32 on"), done.stdout
    assert "loaded" not in done.stderr
