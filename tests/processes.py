"""Start training in processes of its own, alone or under torchrun, and end it the hard way; for tests."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(script: str, arguments: Sequence[str], world: int = 1) -> list[str]:
    """Return the command line that runs a script of the project on `world` ranks."""
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return [*launcher, str(ROOT / script), *arguments]


def run(script: str, arguments: Sequence[str], world: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the project on `world` ranks to its end, with more environment variables."""
    words = command(script, arguments, world)
    return subprocess.run(words, cwd=ROOT, env=ENV | env, capture_output=True, text=True, timeout=300)


def train_all(jobs: Sequence[dict[str, list[str]]], folder: Path, world: int = 1) -> None:
    """Train several jobs, each with `bases` and `overrides`, one after the other in the same processes."""
    path = folder / f"jobs{world}.json"
    path.write_text(json.dumps(jobs))
    done = run("tests/train_jobs.py", [str(path)], world)
    assert done.returncode == 0, done.stderr[-4000:]


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
