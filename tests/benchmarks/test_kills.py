"""What the sweep of kills finds: outputs that differ, leftovers, processes that live on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import types

import pytest

from benchmarks import kills


@pytest.fixture
def command(monkeypatch):
    """Return a function that makes the sweep run another command, its `main`."""

    def make(main):
        module = types.ModuleType("killed_command")
        monkeypatch.setattr(module, "main", main, raising=False)
        monkeypatch.setitem(sys.modules, "killed_command", module)
        monkeypatch.setitem(kills.KINDS, "killed", kills.Kind("killed_command", lambda work, out: [str(out)]))

    return make


def test_a_command_without_faults_passes(command, tmp_path, capsys):
    def main(words):
        os.makedirs(words[0], exist_ok=True)
        with open(f"{words[0]}/file", "w") as file:
            file.write("same")
        return 0

    command(main)
    assert kills.sweep("killed", tmp_path, 3, random.Random(1))
    assert "killed: 3 kills" in (said := capsys.readouterr().out) and "3 equal, 0 with something left, 0 with" in said


def test_differences_and_leftovers_are_found(command, tmp_path, capsys):
    def main(words):
        os.makedirs(words[0], exist_ok=True)
        with open(f"{words[0]}/file", "w") as file:
            file.write(words[0])
        open(f"{words[0]}/.half", "w").close()
        return 0

    command(main)
    assert not kills.sweep("killed", tmp_path, 1, random.Random(1))
    assert "0 equal, 1 with something left" in capsys.readouterr().out


def test_processes_that_live_on_are_found():
    session = subprocess.Popen(["sleep", "60"], start_new_session=True)
    assert kills.alive(session.pid, seconds=0) == [session.pid]
    session.send_signal(signal.SIGKILL)
    session.wait()
    assert kills.alive(session.pid, seconds=0) == []


def test_sidecars_are_compared_without_times(tmp_path):
    (tmp_path / "a.mp4").write_text("video")
    found = []
    for seconds in (1, 2):
        (tmp_path / "a.json").write_text(json.dumps({"seed": 1, "seconds": seconds}))
        found.append(kills.digests(tmp_path, "**/*"))
    assert found[0] == found[1] and len(found[0]) == 2


def test_the_words_are_those_of_the_commands(tmp_path):
    (tmp_path / "training" / "toy-01-01-00-00").mkdir(parents=True)
    for kind in kills.KINDS.values():
        assert str(tmp_path / "out") in " ".join(kind.words(tmp_path, tmp_path / "out"))


def test_half_of_the_kills_come_when_a_file_was_begun(command, tmp_path):
    def main(words):
        os.makedirs(words[0], exist_ok=True)
        for name in (".a", "b"):
            open(f"{words[0]}/{name}", "w").close()
            time.sleep(0.3)
        return 0

    command(main)
    draw = random.Random(1)
    moments = [kills.Moment.drawn(draw, index, 60, 2) for index in range(12)]
    assert [bool(moment.file) for moment in moments] == [False, False, False, True, True, True] * 2
    assert {moment.file for moment in moments} == {0, 1, 2}
    out, kind = tmp_path / "out", kills.KINDS["killed"]
    code, living = kills.kill(kind, [str(out)], out, tmp_path / "log", signal.SIGKILL, kills.Moment(0, file=1))
    assert (code, living) == (-signal.SIGKILL, 0) and [path.name for path in out.iterdir()][0] == ".a"
    code, _ = kills.kill(kind, [str(out)], out, tmp_path / "log", signal.SIGTERM, kills.Moment(60, file=5))
    assert code == 0, "it ended before"
