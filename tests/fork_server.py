"""Run Python command lines in forks of a process with all imports done: ``python tests/fork_server.py SOCKET TESTS``.

Not a test. TESTS are arguments of pytest, whose modules are imported too: pytest's workers are forks of this process,
and each would rewrite the assertions of all modules by itself. A client (`tests.fork_client`) sends its arguments,
environment, working directory and standard streams; a fork of this process runs the command line with them. When the
client is killed, its fork is killed too. The server exits at the end of its standard input, when the process that
started it exits.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

PIDS = "FORK_SERVER_PIDS"  # environment variable: folder in which each fork creates a file named after its process id


def main() -> None:
    """Serve until standard input ends."""
    importlib.import_module("tests.imported")
    if tests := sys.argv[2:]:
        collect(tests)
    gc.freeze()  # garbage collection in a fork would copy the memory of imports
    gc.set_threshold(20_000, 20, 50)  # with the usual ones it takes a tenth of the processor time of tests
    # torchrun names its own methods in events that nobody receives, by a search through all imported modules.
    dynamic_rendezvous.get_method_name = lambda *_: ""
    os.fsync = lambda _: None  # as in tests/conftest.py
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reap without waiting
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return supervise(connection)
            connection.close()


def collect(tests: list[str]) -> None:
    """Import the modules of `tests` as pytest does; errors are left to the workers, which meet them again."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        importlib.import_module("pytest").main(["--collect-only", "-n0", "-p", "no:cacheprovider", *tests])


def supervise(connection: socket.socket) -> None:
    """Fork for the client's command line, and report process id and exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        connection.close()
        os._exit(exit_code(become, streams, **request))
    for stream in streams:
        os.close(stream)
    connection.sendall(pid.to_bytes(8, "big", signed=True))
    threading.Thread(target=kill_without_client, args=(connection, pid), daemon=True).start()
    _, status = os.waitpid(pid, 0)
    try:
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
    except BrokenPipeError:
        pass  # the client was killed
    os._exit(0)


def kill_without_client(connection: socket.socket, pid: int) -> None:
    """Kill a process and its children when the client at the other end of `connection` is gone."""
    if not connection.recv(1) and psutil.pid_exists(pid):
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            member.kill()


def exit_code(work: Callable[..., None], *args: Any, **kwargs: Any) -> int:
    """Call `work` and the atexit handlers; return Python's exit code, without its slow clean-up."""
    code = 0
    try:
        work(*args, **kwargs)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(error.code + "\n")
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def become(streams: list[int], words: list[str], folder: str, env: dict[str, str]) -> None:
    """Run a Python command line in this process."""
    for finalizer in list(weakref.finalize._registry):  # of imports, which the server itself undoes
        finalizer.atexit = False
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    if PIDS in env:
        Path(env[PIDS], str(os.getpid())).touch()
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError:
        pass
    words = words[words[0] == "-u" :]  # passed by torchrun
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
