"""Commands in processes of their own, one at a time: cancelling ends a process, and its failure ends nothing else."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sgm.inference.progress import PROGRESS_FILE, Progress, read_progress
from sgm.io import reason_of
from sgm.project import SOURCES
from sgm.util import InputError, RunError

PYTHON = sys.executable
POLL_SECONDS, GRACE_SECONDS = 0.1, 10  # between looks at a job; before a process that does not end is killed
LOG, PROGRESS, PREVIEW = "log.txt", "progress.json", "preview.jpg"
_ERROR = re.compile(r"(?ms)^error: (.*)\Z")
_NOTICED = ("prompt cut: ",)  # messages of a run that ends well, which whoever asked for it should see
_LAST_LINES = 5  # of a log without a message


class CancelledError(RunError):
    """Its owner has ended a job."""


@dataclass(frozen=True)
class Command:
    """A script of this project with its arguments.

    Attributes:
        words: the script and its arguments.
        folder: an existing one, for its messages.
    """

    words: Sequence[str]
    folder: Path


class Job:
    """Commands that run one after the other; messages of each go to ``log.txt`` in its folder.

    Args:
        owner: whose it is, see `sgm.web.browsers.owner_of`.
        commands: the first that fails ends the job.
        tidy: called with the folder of each, once the job has ended.
    """

    def __init__(self, owner: str, commands: Sequence[Command], tidy: Callable[[Path], object] | None = None) -> None:
        self.owner, self.commands, self.tidy = owner, list(commands), tidy
        self.part = 0  # the command that runs, or the last that ran
        self.cancelled = False
        self.ended: Future[None] = Future()  # of `run`; a queue sets it
        self._process: subprocess.Popen[bytes] | None = None
        self._log: str | None = None  # once the job has ended
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """The folder of the command that runs, or the last that ran."""
        return self.commands[self.part].folder

    def run(self) -> None:
        """Start the processes, and wait for the end of each.

        Raises:
            InputError: wrong input, in the words of the script.
            RunError: a script failed.
            CancelledError: `end` was called.
        """
        try:
            for part in range(len(self.commands)):
                self.part = part
                self._run_one()
        finally:
            self._log = self.log()
            if self.tidy is not None:
                for command in self.commands:
                    self.tidy(command.folder)

    def _run_one(self) -> None:
        try:
            with self._lock:
                process = None if self.cancelled else self._start()
                self._process = process
            code = process.wait() if process is not None else 0
        finally:
            for name in (PROGRESS, PREVIEW):
                (self.folder / name).unlink(missing_ok=True)
        if self.cancelled:
            raise CancelledError("cancelled")
        if code:
            raise (InputError if code == InputError.exit_code else RunError)(message_in(self.log()))

    def _start(self) -> subprocess.Popen[bytes]:
        script, *arguments = self.commands[self.part].words
        env = {**os.environ, PROGRESS_FILE: str(self.folder / PROGRESS)}
        try:
            with (self.folder / LOG).open("wb") as log:
                return subprocess.Popen(
                    [PYTHON, str(SOURCES / script), *arguments],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a group of its own, to end with all that it starts
                )
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise InputError("the settings are longer than a command may be; shorten the prompt") from error
            raise RunError(f"{script} cannot be started in {self.folder}: {reason_of(error)}") from error

    def end(self) -> None:
        """End the process and those that it has started; what has not begun will not start."""
        with self._lock:
            self.cancelled = True
            process = self._process
        for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
            if process is None or process.poll() is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)

    @property
    def progress(self) -> Progress | None:
        """Where the process is; None before it counts."""
        return read_progress(self.folder / PROGRESS)

    @property
    def preview(self) -> bytes | None:
        """The picture that the process writes of what it makes; None before there is one."""
        with contextlib.suppress(OSError):
            return (self.folder / PREVIEW).read_bytes()

    def log(self) -> str:
        """Return the messages so far, of the command that runs or the last that ran."""
        if self._log is not None:
            return self._log
        try:
            return (self.folder / LOG).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""


def notices_in(log: str) -> list[str]:
    """Return the messages of a log that belong beside its result."""
    return [line for line in log.splitlines() if line.startswith(_NOTICED)]


def message_in(log: str) -> str:
    """Return the error that a command has ended with, in its own words; without one, the last lines of its log."""
    found = _ERROR.search(log)
    return found[1].strip() if found else "\n".join(log.strip().splitlines()[-_LAST_LINES:])


class Jobs:
    """The queue of all browsers: one job runs, the others wait in the order of asking."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._unfinished: dict[Future[None], Job] = {}

    def submit(self, job: Job) -> Job:
        """Queue a job. It goes on if nobody watches; `cancel` ends it."""
        job.ended = self._worker.submit(job.run)
        self._unfinished[job.ended] = job
        job.ended.add_done_callback(self._unfinished.pop)
        return job

    def watch(self, job: Job) -> Iterator[Progress | None]:
        """Yield the progress of a job each time that it or the command changes, until the job has ended.

        Raises:
            InputError: wrong input, in the words of the script.
            RunError: a script failed.
            CancelledError: `cancel` ended it.
        """
        last = (0, None)
        yield None
        while not job.ended.done():
            if job.cancelled and self.position(job):  # it will not start when its turn comes
                raise CancelledError("cancelled")
            now = (job.part, job.progress)
            if now != last and (now[1] is not None or now[0] != last[0]):
                last = now
                yield now[1]
            time.sleep(POLL_SECONDS)
        job.ended.result()

    def unfinished(self, owner: str) -> list[Job]:
        """Return the jobs of an owner that run or wait and are not cancelled, in the order of asking."""
        return [job for job in list(self._unfinished.values()) if job.owner == owner and not job.cancelled]

    def position(self, job: Job) -> int:
        """Return how many jobs are before this one; 0: it is running or over."""
        waiting = list(self._unfinished.values())
        return waiting.index(job) if job in waiting else 0

    def cancel(self, owner: str) -> bool:
        """End the jobs of an owner; return whether there were any."""
        found = self.unfinished(owner)
        for job in reversed(found):  # those that wait first, so that none starts
            job.end()
        return bool(found)

    def close(self) -> None:
        """End all jobs, with the page."""
        for job in reversed(list(self._unfinished.values())):
            job.end()
        self._worker.shutdown()
