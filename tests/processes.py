"""Start scripts in separate processes, alone or as ranks, and kill them; for tests."""

import atexit
import functools
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fork_server import PIDS

ROOT = Path(__file__).parents[1]
SHARED_SERVER = "FORKED_PYTHON"  # environment variable of pytest's workers: what `forked_python` returns in all of them
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@functools.cache
def forked_python(*tests: str) -> str:
    """Return the path of a ``python`` whose processes are forked from one with all imports done.

    Starting Python and importing torch, DeepSpeed and SAT takes several CPU seconds, longer than most tests. `tests`
    (arguments of pytest) are imported too.
    """
    if SHARED_SERVER in os.environ:
        return os.environ[SHARED_SERVER]
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(folder / "socket"), *tests],
        cwd=ROOT,
        env=ENV,
        stdin=subprocess.PIPE,  # closed when this process exits, which ends the server
        start_new_session=True,
    )
    wait_until((folder / "socket").exists, server, seconds=600)  # it imports all tests
    python = folder / "python"
    words = [sys.executable, "-IS", str(ROOT / "tests" / "fork_client.py"), str(folder / "socket")]
    python.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    python.chmod(0o755)
    return str(python)


def forked_env() -> dict[str, str]:
    """Return the environment in which launchers and torchrun start forked processes."""
    path = os.pathsep.join([str(Path(forked_python()).parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return ENV | {"PYTHON": forked_python(), "PYTHON_EXEC": forked_python(), "PATH": path}


def wait_until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until a condition holds, while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < end, "the process is too slow"
        time.sleep(0.005)


def command(script: str, arguments: Sequence[str], world: int = 1, python: str = sys.executable) -> list[str]:
    """Return the command line for a script of the project on `world` ranks."""
    launcher = [python]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return [*launcher, str(ROOT / script), *arguments]


def run(script: str, arguments: Sequence[str], world: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the project on `world` ranks to its end, with environment variables `env`, in forked processes.

    Like torchrun, this ends the other ranks when one fails, with exit code 1.
    """
    ranks = rank_environments(world) if world > 1 else [{}]
    words = command(script, arguments, python=forked_python())
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder, name) for name in ("stdout", "stderr")]
        stdout, stderr = (path.open("a") for path in written)
        with stdout, stderr:
            processes = [
                subprocess.Popen(words, cwd=ROOT, env=ENV | env | own, stdout=stdout, stderr=stderr) for own in ranks
            ]
        try:
            code = _wait(processes, seconds=300)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        texts = [path.read_text(encoding="utf-8") for path in written]
    return subprocess.CompletedProcess([script, *arguments], code, *texts)


def rank_environments(world: int) -> list[dict[str, str]]:
    """Return the environment variables that a launcher sets for each rank, with a free port as rendezvous."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _wait(processes: Sequence[subprocess.Popen], seconds: float) -> int:
    """Wait until all have ended or one has failed; return the exit code of a launcher."""
    end = time.monotonic() + seconds
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        assert time.monotonic() < end, f"still running after {seconds} s"
        time.sleep(0.01)
    failed = [code for code in codes if code]
    return failed[0] if len(processes) == 1 and failed else int(bool(failed))


def train_all(jobs: Sequence[Mapping[str, Any]], folder: Path, world: int = 1) -> str:
    """Train several jobs, each with `bases` and `overrides`, sequentially in the same processes; return messages."""
    path = folder / f"jobs{world}.json"
    path.write_text(json.dumps(jobs))
    done = run("tests/train_jobs.py", [str(path)], world)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def restore_linear() -> None:
    """Undo what DeepSpeed's ZeRO 3 does to torch for good: its function is unknown to tensors in eight bits."""
    if "torch" in sys.modules:
        torch: Any = sys.modules["torch"]
        torch.nn.functional.linear = torch._C._nn.linear


def asked(request: pytest.FixtureRequest, *names: str) -> list[tuple[Any, ...]]:
    """Return the values of these parameters in the selected tests that use the requesting fixture."""
    tests = [item for item in request.session.items if request.fixturename in getattr(item, "fixturenames", ())]
    given = [item.callspec.params for item in tests if hasattr(item, "callspec")]
    return list(dict.fromkeys(tuple(params[name] for name in names) for params in given if {*names} <= {*params}))


def selected(request: pytest.FixtureRequest, test: Callable[..., None]) -> bool:
    """Return whether `test` is among the selected tests."""
    return any(getattr(item, "function", None) is test for item in request.session.items)


def only_run(folder: Path) -> Path:
    """Return the only run folder in a folder."""
    (found,) = folder.iterdir()
    return found


class Training:
    """A training in the background, in its own session.

    Args:
        bases: YAML files.
        overrides: dotted ``key=value`` pairs.
        world: ranks; more than one run under torchrun.
        script: run this script instead of training.
        forked: whether all processes are forks, see `forked_python`; `process` is then the client of the first.
        env: additional environment variables.
    """

    def __init__(
        self,
        bases: Sequence[str],
        overrides: Sequence[str],
        world: int = 1,
        *,
        script: str = "train_video.py",
        forked: bool = False,
        **env: str,
    ) -> None:
        # A file, not a pipe, which blocks when full.
        self._messages = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._pids = tempfile.TemporaryDirectory()
        python = forked_python() if forked else sys.executable
        self.process = subprocess.Popen(
            command(script, ["--base", *bases, *overrides], world, python),
            cwd=ROOT,
            env=(forked_env() if forked else ENV) | {PIDS: self._pids.name} | env,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
            start_new_session=True,
        )

    def messages(self) -> str:
        """Return its standard error so far."""
        self._messages.seek(0)
        return self._messages.read()

    def forks(self) -> list[int]:
        """Return the ids of its forked processes, including ended ones."""
        return [int(path.name) for path in Path(self._pids.name).iterdir()]

    def ended(self) -> bool:
        return self.process.poll() is not None

    def finish(self, seconds: float = 300, *, code: int = 0) -> str:
        """Wait for the end, check the exit code, and return the messages."""
        try:
            ended = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.messages()[-3000:]}") from None
        assert ended == code, self.messages()[-3000:]
        return self.messages()

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait until a condition holds, while the training runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert not self.ended(), self.messages()[-3000:]
            assert time.monotonic() < end, "the run is too slow"
            time.sleep(0.005)

    def kill(self) -> None:
        """Kill all processes together; torchrun starts its workers in separate sessions."""
        roots = [psutil.Process(pid) for pid in [self.process.pid, *self.forks()] if psutil.pid_exists(pid)]
        family = {member for root in roots for member in [root, *root.children(recursive=True)]}
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                pass  # ended together with one killed before
        psutil.wait_procs(family)
        self.process.wait()
