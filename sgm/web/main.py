"""The command line of ``tools/web.py``."""

import argparse
import errno
import importlib.util
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from sgm import cli
from sgm.io import reason_of, require_writable
from sgm.log import get_logger
from sgm.project import shipped
from sgm.util import InputError

logger = get_logger(__name__)

HOST, PORTS = "127.0.0.1", range(7860, 7960)
# Folders of trained weights are looked into if they exist; the last is the toy's LoRA.
OUTPUTS, RUNS = "outputs/web", ("ckpts", "outputs", "assets/toy_land")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.tool_parser("Serve a page for the browser that samples, compares, and watches training.")
    parser.add_argument(
        "--host", default=HOST, help=f"address to listen on; {HOST}, the default, is this machine alone"
    )
    parser.add_argument("--port", type=int, help=f"port to listen on; a free one from {PORTS[0]} on by default")
    parser.add_argument(
        "--outputs", default=OUTPUTS, metavar="FOLDER", help=f"videos and history; {OUTPUTS} by default"
    )
    parser.add_argument("--configs", default="configs", metavar="FOLDER", help="model files and presets")
    parser.add_argument(
        "--runs", nargs="+", metavar="FOLDER", help=f"LoRAs, and trainings to watch; {', '.join(RUNS)} by default"
    )
    parser.add_argument("--data", nargs="+", metavar="FOLDER", default=[], help="clips for training")
    return parser.parse_args(argv)


def free_port(host: str, port: int | None) -> int:
    """Return a port that is free at an address of this machine: `port`, or without one the first of `PORTS`.

    gradio would try each for seconds, and asks for the port on `HOST` besides.

    Raises:
        InputError: `host` is no address of this machine, or the port is none or taken.
    """
    if port is not None and not 0 < port < 2**16:
        raise InputError(f"--port is {port}; give a number from 1 to {2**16 - 1}, or leave it out to take a free one")
    try:
        kind, *_, where = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: {reason_of(error)}; {_ADDRESSES}") from error
    reason = ""
    for each in PORTS if port is None else (port,):
        try:
            for family, address in ((kind, where), (socket.AF_INET, (HOST, 0))):
                with socket.socket(family) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((address[0], each, *address[2:]))
            return each
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise InputError(f"--host {host}: {reason_of(error)}; {_ADDRESSES}") from error
            reason = reason_of(error)
    asked = f"port {port}" if port is not None else f"ports {PORTS[0]} to {PORTS[-1]}"
    cure = "choose another --port" + ("" if port is None else ", or leave it out to take a free one")
    raise InputError(f"the page cannot be served at {host}, {asked}: {reason}; {cure}")


_ADDRESSES = f"give an address of this machine, such as {HOST}, or 0.0.0.0 for all of them"


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it.

    Raises:
        InputError: gradio is missing, a folder does not exist, or the address is not to be had.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs gradio: run make web, or: pip install -e '.[web]'")
    port = free_port(options.host, options.port)
    from sgm.web.choices import Folders
    from sgm.web.page import Page, existing  # after parsing, so that --help is fast

    known = [shipped(folder) for folder in RUNS]
    runs = [folder for folder in known if Path(folder).is_dir()] if options.runs is None else options.runs
    require_writable(options.outputs)
    folders = Folders(
        outputs=Path(options.outputs),
        configs=existing([shipped(f"{options.configs}/")])[0],
        runs=existing(runs),
        data=existing(options.data),
    )
    page = Page(folders)
    try:
        address = page.launch(options.host, port)
        logger.info("open %s in a browser; Ctrl-C ends the page", address)
        if options.host != HOST:
            found = "whoever reaches this machine can sample without a password, and see the samples of trainings"
            logger.warning("--host %s: %s", options.host, found)
        threading.Event().wait()
    finally:
        page.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 failed, 2 wrong input."""
    return cli.run_command(
        run, parse(argv), interrupted="the page has ended; finished videos are kept", output="--outputs"
    )
