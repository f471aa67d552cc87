"""All figures by one command: its parts exist, and one that fails stops no other."""

import importlib

import pytest

import benchmarks.__main__ as command


def test_every_part_is_a_module_with_a_place_in_the_document():
    text = (command.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for words in command.PARTS.values():
        name = next(word for word in words if word.startswith("benchmarks."))
        assert callable(importlib.import_module(name).main)
        assert name in text or name == "benchmarks.gpu", name
    assert "-m benchmarks\n" in (command.ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", [0, 3])
def test_a_part_that_fails_is_named_and_the_others_run(code, monkeypatch, capsys):
    started = []

    def run(words):
        started.append(words)
        return (code if "benchmarks.steps" in words else 0), 2.0, 3.0

    monkeypatch.setattr(command, "run", run)
    assert command.main(["--only", "steps", "traffic"]) == bool(code)
    assert started == [command.PARTS["steps"], command.PARTS["traffic"]]
    printed = capsys.readouterr()
    assert "## traffic: python -m benchmarks.traffic\n" in printed.out and "(2 s, processor time 3 s)" in printed.out
    assert ("failed: steps" in printed.err) is bool(code)


def test_files_of_a_part_go_where_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    (tmp_path / "writes.py").write_text("import sys; open(sys.argv[1], 'w').write('x'); sys.exit(4)")
    code, seconds, spent = command.run(["writes", f"{command.FOLDER}/file"])
    assert code == 4 and seconds > 0 and spent > 0
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["writes.py"]
