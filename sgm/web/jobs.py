"""Commands in processes of their own, one at a time: cancelling ends a process, and its failure ends nothing else."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from sgm.inference.progress import PROGRESS_FILE, Progress, read_progress
from sgm.project import SOURCES
from sgm.util import InputError, RunError

PYTHON = sys.executable
POLL_SECONDS, GRACE_SECONDS = 0.1, 10  # between looks at a job; before a process that does not end is killed
LOG, PROGRESS = "log.txt", "progress.json"
_ERROR = re.compile(r"(?ms)^error: (.*)\Z")
_LAST_LINES = 5  # of a log without a message


class CancelledError(RunError):
    """The session has ended its job."""


class Job:
    """A script of this project that runs for a session; its messages go to ``log.txt`` in `folder`.

    Args:
        owner: the session.
        words: the script and its arguments.
        folder: an existing one.
    """

    def __init__(self, owner: str, words: Sequence[str], folder: Path) -> None:
        self.owner, self.words, self.folder = owner, list(words), folder
        self.cancelled = False
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def run(self) -> None:
        """Start the process, and wait for its end.

        Raises:
            InputError: wrong input, in the words of the script.
            RunError: the script failed.
            CancelledError: `end` was called.
        """
        try:
            with self._lock:
                process = None if self.cancelled else self._start()
                self._process = process
            code = process.wait() if process is not None else 0
        finally:
            (self.folder / PROGRESS).unlink(missing_ok=True)
        if self.cancelled:
            raise CancelledError("cancelled")
        if code:
            raise (InputError if code == InputError.exit_code else RunError)(message_in(self.log()))

    def _start(self) -> subprocess.Popen[bytes]:
        script, *arguments = self.words
        env = {**os.environ, PROGRESS_FILE: str(self.folder / PROGRESS)}
        with (self.folder / LOG).open("wb") as log:
            return subprocess.Popen(
                [PYTHON, str(SOURCES / script), *arguments],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a group of its own, to end with all that it starts
            )

    def end(self) -> None:
        """End the process and those that it has started; without a process, the job will not start."""
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

    def log(self) -> str:
        """Return the messages so far."""
        try:
            return (self.folder / LOG).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""


def message_in(log: str) -> str:
    """Return the error that a command has ended with, in its own words; without one, the last lines of its log."""
    found = _ERROR.search(log)
    return found[1].strip() if found else "\n".join(log.strip().splitlines()[-_LAST_LINES:])


class Jobs:
    """The queue of all sessions: one job runs, the others wait in the order of asking."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._unfinished: dict[Future[None], Job] = {}

    def submit(self, job: Job) -> Iterator[Progress | None]:
        """Queue a job, and yield its progress each time that it changes, until it has ended.

        The job goes on if nobody asks for its progress any more; `cancel` ends it.

        Raises:
            InputError: wrong input, in the words of the script.
            RunError: the script failed.
            CancelledError: `cancel` ended it.
        """
        future = self._worker.submit(job.run)
        self._unfinished[future] = job
        future.add_done_callback(self._unfinished.pop)
        return self._watch(job, future)

    def _watch(self, job: Job, future: Future[None]) -> Iterator[Progress | None]:
        last = None
        yield last
        while not future.done():
            if (now := job.progress) is not None and now != last:
                last = now
                yield last
            time.sleep(POLL_SECONDS)
        future.result()

    def position(self, job: Job) -> int:
        """Return how many jobs are before this one; 0: it is running or over."""
        waiting = list(self._unfinished.values())
        return waiting.index(job) if job in waiting else 0

    def cancel(self, owner: str) -> bool:
        """End the jobs of a session; return whether there were any."""
        found = [job for job in list(self._unfinished.values()) if job.owner == owner]
        for job in found:
            job.end()
        return bool(found)

    def close(self) -> None:
        """End all jobs, with the page."""
        for job in list(self._unfinished.values()):
            job.end()
        self._worker.shutdown()
