"""The launcher and the contact sheet tool, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue square; touch $(pwd)/x\n")
    return path


def test_inference_sh_merges_yaml_files_and_passes_the_rest(tiny_model, prompts, tmp_path):
    second = tmp_path / "more.yaml"
    second.write_text("args:\n  num_steps: 1\n")
    words = [f"args.input_file={prompts}", f"args.output_dir={tmp_path / 'out'}", "--seed", "3"]
    done = run("bash", "inference.sh", str(tiny_model("dit_t2v_2b")), str(second), *words)
    assert done.returncode == 0, done.stderr
    assert "2 written, 0 skipped" in done.stderr
    assert len(list((tmp_path / "out").glob("*/0/000000.mp4"))) == 2

    sheet = tmp_path / "sheet.png"
    done = run(sys.executable, "tools/contact_sheet.py", str(tmp_path / "out"), "--out", str(sheet))
    assert done.stdout.splitlines()[-1] == f"contact sheet: {sheet}"
    assert iio.imread(sheet).shape[0] > 2 * 192  # a row each


def test_inference_sh_starts_several_processes(tiny_model, prompts, tmp_path):
    words = [f"args.input_file={prompts}", f"args.output_dir={tmp_path / 'out'}", "args.only_save_latents=true"]
    done = run("bash", "inference.sh", str(tiny_model("dit_t2v_2b")), *words, NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*/0/000000.safetensors"))) == 2


@pytest.mark.parametrize("processes", ["1", "2"])
def test_inference_sh_hands_on_the_exit_code(processes):
    done = run("bash", "inference.sh", "configs/no_such.yaml", NPROC_PER_NODE=processes)
    assert done.returncode == 2 and "no_such.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_inference_sh_with_words_alone_samples_the_toy_once(tmp_path):
    done = run("bash", "inference.sh", f"args.output_dir={tmp_path}", "args.num_steps=1", "args.only_save_latents=true")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/0/000000.safetensors"))) == 6
    assert run("bash", "inference.sh", "--help").stdout.count("usage:") == 1


def test_contact_sheet_of_nothing(tmp_path):
    done = run(sys.executable, "tools/contact_sheet.py", str(tmp_path), "--out", str(tmp_path / "sheet.png"))
    assert done.returncode == 2 and str(tmp_path) in done.stderr and not (tmp_path / "sheet.png").exists()
