"""Start scripts in processes of their own, alone or as ranks, and end them the hard way; for tests."""

import atexit
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.imported"])


def command(script: str, arguments: Sequence[str], world: int = 1) -> list[str]:
    """Return the command line that runs a script of the project on `world` ranks."""
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return [*launcher, str(ROOT / script), *arguments]


def run(script: str, arguments: Sequence[str], world: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the project on `world` ranks to its end, with more environment variables.

    The processes are forked from one that has imported everything, see `tests.imported`: starting Python and importing
    torch, DeepSpeed and SAT takes longer than most of what tests do. Like torchrun, this ends the other ranks when one
    fails, with exit code 1.
    """
    ranks = rank_environments(world) if world > 1 else [{}]
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in written:
            path.touch()
        processes = [_FORKS.Process(target=_work, args=(script, arguments, written, env | own)) for own in ranks]
        for process in processes:
            process.start()
        try:
            code = _wait(processes, seconds=300)
        finally:
            for process in processes:
                process.kill()
                process.join()
        texts = [path.read_text(encoding="utf-8") for path in written]
    return subprocess.CompletedProcess([script, *arguments], code, *texts)


def rank_environments(world: int) -> list[dict[str, str]]:
    """Return the variables by which a launcher tells ranks who they are; they meet at a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _work(script: str, arguments: Sequence[str], written: Sequence[Path], env: dict[str, str]) -> None:
    """Be the process of a script."""
    for number, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    multiprocessing.set_start_method(None, force=True)  # as in a process that was started, not forked from the server
    os.environ.update(env)
    os.chdir(ROOT)
    path = str(ROOT / script)
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def _wait(processes: Sequence[BaseProcess], seconds: float) -> int:
    """Wait until all have ended, or one has failed; return the exit code of a launcher."""
    end = time.monotonic() + seconds
    running = list(processes)
    while running:
        ended = multiprocessing.connection.wait([process.sentinel for process in running], end - time.monotonic())
        assert ended, f"still running after {seconds} s"
        if failed := [process.exitcode for process in running if process.exitcode]:
            return failed[0] if len(processes) == 1 else 1
        running = [process for process in running if process.exitcode is None]
    return 0


def train_all(jobs: Sequence[dict[str, list[str]]], folder: Path, world: int = 1) -> None:
    """Train several jobs, each with `bases` and `overrides`, one after the other in the same processes."""
    path = folder / f"jobs{world}.json"
    path.write_text(json.dumps(jobs))
    done = run("tests/train_jobs.py", [str(path)], world)
    assert done.returncode == 0, done.stderr[-4000:]


def asked(request: pytest.FixtureRequest, *names: str) -> list[tuple[Any, ...]]:
    """Return what the selected tests that use the asking fixture have for these parameters: nothing else is needed."""
    tests = [item for item in request.session.items if request.fixturename in getattr(item, "fixturenames", ())]
    given = [item.callspec.params for item in tests if hasattr(item, "callspec")]
    return list(dict.fromkeys(tuple(params[name] for name in names) for params in given if {*names} <= {*params}))


def only_run(folder: Path) -> Path:
    """Return the one run folder in a folder."""
    (found,) = folder.iterdir()
    return found


class Training:
    """A training in the background, in a session of its own.

    Args:
        bases: YAML files.
        overrides: dotted ``key=value`` pairs.
        world: ranks; more than one run under torchrun.
        script: another one to run than that of training.
        env: more environment variables.
    """

    def __init__(
        self,
        bases: Sequence[str],
        overrides: Sequence[str],
        world: int = 1,
        *,
        script: str = "train_video.py",
        **env: str,
    ) -> None:
        # A file, not a pipe: a process that writes much would wait for somebody to read it.
        self._messages = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command(script, ["--base", *bases, *overrides], world),
            cwd=ROOT,
            env=ENV | env,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
            start_new_session=True,
        )

    def messages(self) -> str:
        """Return what it has written to standard error so far."""
        self._messages.seek(0)
        return self._messages.read()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def finish(self, seconds: float = 300, *, code: int = 0) -> str:
        """Wait for the end, with this exit code; return the messages."""
        try:
            ended = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.messages()[-3000:]}") from None
        assert ended == code, self.messages()[-3000:]
        return self.messages()

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait until something holds, while the training runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert not self.ended(), self.messages()[-3000:]
            assert time.monotonic() < end, "the run is too slow"
            time.sleep(0.005)

    def kill(self) -> None:
        """Kill everything at once: torchrun starts its workers in sessions of their own."""
        parent = psutil.Process(self.process.pid)
        family = [parent, *parent.children(recursive=True)]
        for member in family:
            member.kill()
        psutil.wait_procs(family)
        self.process.wait()
