"""All rows of the benchmark of accelerators, at the size of a CPU."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import gpu
from dit_video_concat import DiffusionTransformer
from sgm.io import write_json
from tests.marks import thorough
from tests.processes import forked_python
from vae_modules import autoencoder
from vae_modules.compiled_norms import CompiledNorms


@pytest.fixture
def tiny(monkeypatch, tmp_path, capsys):
    """Return a function that runs the benchmark, and returns its exit code, its rows and what it printed."""

    def run(*words):
        code = gpu.main(["--size", "tiny", "--json", str(tmp_path / "rows.json"), *words])
        content = json.loads((tmp_path / "rows.json").read_text())
        return code, {name: gpu.Figures(**row) for name, row in content["rows"].items()}, capsys.readouterr().out

    return run


@pytest.mark.parametrize("only", ["2B", thorough("")])
def test_every_row_runs_at_tiny_size(tiny, monkeypatch, only):
    compiled = []  # nothing is, which would take minutes
    monkeypatch.setattr(DiffusionTransformer, "compile", lambda network: compiled.append("ours"))
    monkeypatch.setattr(nn.Module, "compile", lambda module, fullgraph: compiled.append(type(module).__name__))
    monkeypatch.setattr(autoencoder, "CompiledNorms", partial(CompiledNorms, backend="eager"))
    # tests/gpu compares estimates with peaks.
    for owner, name in ((gpu, "step_estimate"), (gpu, "vae_estimate"), (gpu.GuidedStep, "estimate")):
        monkeypatch.setattr(owner, name, lambda *_: 2e6)
    code, rows, printed = tiny("--only", only)
    assert code == 0
    assert list(rows) == [name for name in gpu.rows(gpu.Bench("tiny", torch.device("cpu"))) if only in name]
    both = ["ours", *2 * ["CogVideoXBlock"]]
    assert compiled == (both if only else [*both, *both, "ours", "ours"])
    for name, row in rows.items():
        beside = name in ("VAE, encode", "VAE, decode", "2B, CFG step", "5B, CFG step")
        assert (row.seconds is None) == name.endswith("accelerators"), (name, row)
        assert (row.diffusers_peak is not None) == beside and (row.ratio is not None) >= beside, (name, row)
        assert (
            (row.peak is None)
            == (row.estimate is None)
            == ("compiled" in name or "sampler" in name or "accelerators" in name)
        ), (name, row)
        assert gpu.line(name, row) in printed.splitlines()


def test_a_second_start_goes_on_after_rows_that_are_known(tiny, monkeypatch, tmp_path, capsys):
    done = []

    def row(name, *errors):
        def work():
            done.append(name)
            if errors and done.count(name) == 1:
                raise errors[0]
            return gpu.Figures(seconds=1.0, peak=2.0**30, estimate=2.0**31, note=name)

        return work

    table = {"a": row("a"), "b": row("b", AssertionError("no | memory")), "c": row("c", KeyboardInterrupt())}
    table["d"] = row("d")
    monkeypatch.setattr(gpu, "rows", lambda _: table)
    with pytest.raises(KeyboardInterrupt):
        tiny()
    assert "| failed: AssertionError: no / memory |" in capsys.readouterr().out
    failed = json.loads((tmp_path / "rows.json").read_text())["failed"]
    assert failed == {"b": "AssertionError: no | memory", "c": "cut off"}
    code, rows, printed = tiny()
    assert code == 0 and list(rows) == ["a", "d", "b", "c"] and done == ["a", "b", "c", "d", "b", "c"]
    assert printed.splitlines()[2] == "| a | 1000 ms |  |  | 1.00 |  | 2.00 | 0.500 | a |"
    path = tmp_path / "rows.json"
    content = json.loads(path.read_text())
    for wrong, message in (
        ({**content, "environment": {**content["environment"], "torch": "1.0"}}, "torch '1.0', now"),
        ([], "holds no rows of this benchmark"),
    ):
        write_json(path, wrong)
        with pytest.raises(SystemExit, match="2"):
            tiny()
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_released_sizes_need_an_accelerator(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "need an accelerator" in capsys.readouterr().err


def test_ranks_share_a_step(monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", forked_python())
    monkeypatch.setenv("PYTHON_EXEC", forked_python())
    assert gpu.shared_step("cogvideox_5b", "tiny", 2) > 0
