"""A `python` with imports done, forked by a server: ``python -IS tests/fork_client.py SOCKET WORDS...``.

Not a test; see `tests.fork_server`. Imports only the standard library, to start in a few milliseconds. Terminating
signals are forwarded to the process group of the fork.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def main() -> None:
    """Run the command line on the server, and exit like it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    words = {"words": sys.argv[2:], "folder": os.getcwd(), "env": dict(os.environ)}
    request = json.dumps(words).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(request)
    pid = number(connection)
    for each in PASSED_ON:
        signal.signal(each, lambda received, _: os.killpg(pid, received))
    code = number(connection)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def number(connection: socket.socket) -> int:
    """Receive a number."""
    received = connection.recv(8, socket.MSG_WAITALL)
    if not received:
        sys.exit("the fork server has ended")
    return int.from_bytes(received, "big", signed=True)


if __name__ == "__main__":
    main()
