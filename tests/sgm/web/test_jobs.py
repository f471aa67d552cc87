"""Processes: one at a time, ended by their owner alone, their errors told."""

import os
import shutil
import signal
import threading
import time

import psutil
import pytest

from sgm.inference.progress import PROGRESS_FILE, Progress, progress, read_progress
from sgm.util import InputError, RunError
from sgm.web import jobs
from sgm.web.jobs import CancelledError, Command, Job, Jobs, message_in, notices_in

COUNTS = """
import json, os, sys, time
path = os.environ["SAMPLING_PROGRESS_FILE"]
open(path, "w").write(json.dumps({"what": "steps", "done": 1, "total": 2}))
while not os.path.exists(sys.argv[1]): time.sleep(0.005)
"""
SLEEPS = """
import subprocess, sys, time
subprocess.Popen(["sleep", "60"])
open(sys.argv[1], "w").close()
time.sleep(60)
"""
FAILS = """
import sys
print("wrote 1", flush=True)
sys.stderr.write("error: no size\\n  -> 64x64\\n")
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def queue(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.005)
    queue = Jobs()
    yield queue
    queue.close()


def command(tmp_path, code, *arguments) -> Command:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(code)
    return Command([str(script), *map(str, arguments)], folder)


def job(tmp_path, code, *arguments, owner="me") -> Job:
    return Job(owner, [command(tmp_path, code, *arguments)])


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_jobs_run_one_after_the_other_and_tell_their_progress(tmp_path, queue):
    first, second = job(tmp_path, COUNTS, tmp_path / "go"), job(tmp_path, COUNTS, tmp_path / "go")
    seen, later = [queue.watch(queue.submit(each)) for each in (first, second)]
    assert next(seen) is None and next(seen) == Progress("steps", 1, 2)
    assert next(later) is None and second.progress is None, "it waits"
    assert (queue.position(first), queue.position(second)) == (0, 1)
    (tmp_path / "go").touch()
    assert list(seen) == []
    assert list(later)[-1:] in ([], [Progress("steps", 1, 2)])
    assert queue.position(second) == 0 and not (second.folder / jobs.PROGRESS).exists()


def test_cancelling_ends_the_whole_group_of_its_owner_alone(tmp_path, queue):
    mine, others = job(tmp_path, SLEEPS, tmp_path / "began"), job(tmp_path, FAILS, 0, owner="you")
    seen, later = [queue.watch(queue.submit(each)) for each in (mine, others)]
    wait_for((tmp_path / "began").exists)
    process = psutil.Process(mine._process.pid)
    (child,) = process.children()
    assert not queue.cancel("stranger") and process.is_running()
    assert queue.cancel("me")
    with pytest.raises(CancelledError):
        list(seen)
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)  # killed, and gone soon
    assert list(later) == [None], "the next one runs"


def test_a_cancelled_job_that_waits_never_starts(tmp_path, queue):
    running, waiting = job(tmp_path, COUNTS, tmp_path / "go"), job(tmp_path, FAILS, 0, owner="you")
    seen, later = [queue.watch(queue.submit(each)) for each in (running, waiting)]
    assert queue.cancel("you")
    (tmp_path / "go").touch()
    list(seen)
    with pytest.raises(CancelledError):
        list(later)
    assert waiting.log() == "" and waiting._process is None


def test_commands_of_a_job_run_in_order_and_the_first_that_fails_ends_it(tmp_path, queue):
    tidied = []
    parts = [command(tmp_path, COUNTS, tmp_path / "go"), command(tmp_path, FAILS, 1), command(tmp_path, FAILS, 0)]
    both = queue.submit(Job("me", parts, tidied.append))
    seen = queue.watch(both)
    assert next(seen) is None and next(seen) == Progress("steps", 1, 2) and queue.unfinished("me") == [both]
    (both.folder / jobs.PREVIEW).write_bytes(b"picture")
    assert both.preview == b"picture" and tidied == [] and queue.unfinished("you") == []
    again = queue.watch(both)  # another window
    (tmp_path / "go").touch()
    for watched in (seen, again):
        with pytest.raises(RunError, match="no size"):
            list(watched)
    assert both.part == 1 and tidied == [part.folder for part in parts] and queue.unfinished("me") == []
    assert not (parts[0].folder / jobs.PREVIEW).exists() and not (parts[2].folder / jobs.LOG).exists()


def test_a_process_that_ignores_the_signal_is_killed(tmp_path, queue, monkeypatch):
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.05)
    code = f"import signal\nsignal.signal({int(signal.SIGTERM)}, signal.SIG_IGN)\n{SLEEPS}"
    stubborn = job(tmp_path, code, tmp_path / "began")
    seen = queue.watch(queue.submit(stubborn))
    wait_for((tmp_path / "began").exists)
    threading.Thread(target=queue.cancel, args=["me"]).start()
    with pytest.raises(CancelledError):
        list(seen)
    assert stubborn._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("code", "error"), [(2, InputError), (1, RunError), (143, RunError)])
def test_a_failure_is_told_in_the_words_of_the_command(tmp_path, queue, code, error):
    failing = job(tmp_path, FAILS, code)
    with pytest.raises(error) as caught:
        list(queue.watch(queue.submit(failing)))
    assert str(caught.value) == "no size\n  -> 64x64" and type(caught.value) is error
    assert failing.log().startswith("wrote 1\n")


def test_a_command_that_cannot_start_is_told(tmp_path, queue):
    gone = job(tmp_path, FAILS)
    shutil.rmtree(gone.folder)
    with pytest.raises(RunError, match="cannot be started in .*: No such file"):
        list(queue.watch(queue.submit(gone)))
    with pytest.raises(InputError, match="longer than a command may be; shorten the prompt"):
        list(queue.watch(queue.submit(job(tmp_path, FAILS, "x" * 200_000))))


def test_without_a_message_the_last_lines_are_told():
    assert message_in("\n".join(map(str, range(9)))) == "4\n5\n6\n7\n8"
    assert message_in("x\nerror: no file\nas was said\n") == "no file\nas was said"


def test_a_run_writes_its_progress_only_if_somebody_asks(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    assert list(progress([5, 6], "steps")) == [5, 6] and read_progress(path) is None
    monkeypatch.setenv(PROGRESS_FILE, str(path))
    seen = [(item, read_progress(path)) for item in progress([5, 6], "steps")]
    assert seen == [(5, Progress("steps", 0, 2)), (6, Progress("steps", 1, 2))]
    assert read_progress(path) == Progress("steps", 2, 2) and os.listdir(tmp_path) == ["progress.json"]
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "none" / "progress.json"))
    assert list(progress(range(2), "steps")) == [0, 1], "nobody's reading fails no run"


def test_a_cut_prompt_is_told_beside_the_result():
    cut = "prompt cut: it has 32 tokens and max_length is 16; dropped: 'b' (prompt: 'a b')"
    assert notices_in(f"loading T5\n{cut}\nwrote a.mp4: a prompt cut: b\n") == [cut]
