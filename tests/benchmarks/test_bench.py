import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench
from benchmarks.models import NetworkSize
from dit_video_concat import DiffusionTransformer

TINY = NetworkSize(32, 2, 1, 16, latents=(2, 4, 4), text_length=3, text_hidden_size=8)


@pytest.fixture
def tiny_cases(monkeypatch):
    models = ("cogvideox_2b", "cogvideox1.5_5b")
    monkeypatch.setitem(bench.NETWORKS, "cpu", [bench.NetworkCase(m, TINY, TINY.latents, TINY.latents) for m in models])
    monkeypatch.setitem(bench.VAES, "cpu", [bench.VaeCase("cogvideox_5b", (9, 16, 16), ch=32, num_res_blocks=1)])


def test_one_command_times_everything_and_writes_json(tiny_cases, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench.main(["--sizes", "cpu", "--repeats", "1", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert [result["what"] for result in content["results"]] == [
        "cogvideox_2b 2×4×4 forward",
        "cogvideox_2b 2×4×4 forward + backward",
        "cogvideox1.5_5b 2×4×4 forward",
        "cogvideox1.5_5b 2×4×4 forward + backward",
        "vae ch 32 9×16×16 encode",
        "vae ch 32 9×16×16 decode",
    ]
    assert all(result["max_difference"] <= 2e-5 < 0.1 < result["max_output"] for result in content["results"])
    assert content["environment"]["threads"] == torch.get_num_threads()
    assert content["environment"]["diffusers"] and content["environment"]["torch"]
    printed = capsys.readouterr().out
    assert "released sizes are skipped" in printed and printed.count("\n| ") == 7


def test_turns_alternate_and_the_first_call_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    order = []

    def side(name, seconds):
        def call():
            order.append(name)
            clock[0] += seconds if order.count(name) > 1 else 100
            return torch.tensor([1.0 if name == "ours" else 1.5])

        return call

    setup = bench.Setup(torch.device("cpu"), torch.float32, repeats=3)
    result = setup.compare("x", side("ours", 2.0), side("theirs", 4.0))
    assert (result.ours, result.diffusers, result.ratio) == (2.0, 4.0, 0.5)
    assert (result.max_difference, result.max_output) == (0.5, 1.5)
    assert order == ["ours", "theirs"] + ["theirs", "ours", "ours", "theirs", "theirs", "ours"]


def test_both_sides_are_compiled(tiny_cases, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(DiffusionTransformer, "compile", lambda network: compiled.append("ours"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, fullgraph: compiled.append(type(module).__name__))
    monkeypatch.setattr(bench, "cold_compiler", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(bench, "kernels_of_a_block", lambda: 6)
    assert bench.main(["--sizes", "cpu", "--only", "dit", "--compile", "--repeats", "1"]) == 0
    assert compiled == ["ours", "CogVideoXBlock"] * 2
    printed = capsys.readouterr().out
    assert "cogvideox_2b compiled 2×4×4 forward: first calls " in printed and "\n6 kernels in a compiled" in printed
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--compile"])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_released_sizes_need_an_accelerator(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--sizes", "released"])
    assert "needs an accelerator" in capsys.readouterr().err


@pytest.mark.slow  # machine code for nine kernels
def test_code_of_an_accelerator_is_generated_and_compiled_without_one():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.accelerator_code"]
    done = subprocess.run(command, cwd=Path(bench.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines.pop(6) == "a block: 6 kernels for capability 9.0, beside 5 products and attention"
    assert lines.pop() == "a norm of the VAE: 3 kernels for capability 9.0"
    assert len(lines) == 9
    assert all(re.fullmatch(r"triton_\w+: [1-9]\d+ bytes of machine code", line) for line in lines), lines
