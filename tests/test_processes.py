"""The forked Python of `tests.processes` exits, prints and is killed like a started one."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.fork_server import PIDS
from tests.processes import ENV, forked_env, forked_python, wait_until


def start(code: str, *words: str, **env: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen([forked_python(), "-c", code, *words], env=ENV | env, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('wrong')", 1, "wrong\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import atexit, sys; atexit.register(lambda: sys.stderr.write('last'))", 0, "last"),
    ],
)
def test_exit_codes_and_messages(code, exit_code, message):
    process = start(code)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == exit_code and messages.endswith(message)


def test_arguments_environment_and_imports(tmp_path):
    code = "import os, sys; print(sys.argv[1:], os.environ['WORD'], os.environ.get('HOME'), 'torch' in sys.modules)"
    process = subprocess.Popen(
        [forked_python(), "-c", code, "a b", "$c"], env={"WORD": "x"}, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.communicate(timeout=60)[0] == "['a b', '$c'] x None True\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_fork_ends_with_its_client(tmp_path, number):
    process = start("import time; time.sleep(300)", **{PIDS: str(tmp_path)})
    wait_until(lambda: [*tmp_path.iterdir()], process)
    fork = psutil.Process(int(next(tmp_path.iterdir()).name))
    os.kill(process.pid, number)
    assert process.wait(60) == -number
    fork.wait(60)
    process.communicate()


def test_python_of_a_shell_is_forked(tmp_path):
    code = "import os, sys; print('torch' in sys.modules, os.getcwd())"
    command = ["bash", "-c", f'python -c "{code}"']
    done = subprocess.run(command, env=forked_env(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == f"True {Path(tmp_path).resolve()}\n"
