import sys
from pathlib import Path

import pytest

from benchmarks import start_time
from sgm.inference.main import parse as parse_sampling
from sgm.training.main import parse as parse_training


def test_the_median_of_each_command_is_printed(monkeypatch, capsys):
    times = iter([3.0, 1.0, 2.0] * len(start_time.COMMANDS))
    asked = []
    monkeypatch.setattr(start_time, "seconds", lambda command: asked.append(command) or next(times))
    assert start_time.main(["--runs", "3"]) == 0
    assert asked == [command for command in start_time.COMMANDS for _ in range(3)]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"   2.00 s  {command}" for command in start_time.COMMANDS]


def test_no_runs_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        start_time.main(["--runs", "0"])
    assert ended.value.code == 2 and "--runs=0: give 1 or more" in capsys.readouterr().err


def test_a_command_that_fails_ends_with_its_messages(monkeypatch):
    monkeypatch.setattr(start_time.sys, "executable", "false")
    with pytest.raises(SystemExit, match="sample_video.py --help: exit code 1"):
        start_time.seconds("sample_video.py --help")
    monkeypatch.undo()
    assert start_time.seconds("-c pass") > 0


def test_the_commands_can_be_checked():
    for command in start_time.COMMANDS[1:]:
        script, *words = command.split()
        options = {"sample_video.py": parse_sampling, "train_video.py": parse_training}[script](words)
        assert options.check and all(Path(start_time.ROOT, base).is_file() for base in options.base)
    assert sys.modules["benchmarks.start_time"].COMMANDS[0].endswith("--help")
