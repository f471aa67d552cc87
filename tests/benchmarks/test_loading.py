import pytest

from benchmarks import loading


def test_every_kind_of_file_is_loaded_with_and_without_checks(monkeypatch, capsys):
    monkeypatch.setattr(loading, "SIDE", 8)
    assert loading.main(["--gb", "3e-7", "--runs", "1", "--dtype", "float32"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("0.0 GB of float32")
    kinds = ["own .pt", "resume state", "own .safetensors", "other .pt", "other .safetensors"]
    assert [row.partition(" CPU ")[0].strip() for row in rows] == kinds


def test_no_runs_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        loading.main(["--runs", "0"])
    assert ended.value.code == 2 and "--runs=0: give 1 or more" in capsys.readouterr().err
