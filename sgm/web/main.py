"""The command line of ``tools/web.py``."""

import argparse
import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path

from sgm import cli
from sgm.io import require_writable
from sgm.log import get_logger
from sgm.project import shipped
from sgm.util import InputError

logger = get_logger(__name__)

HOST, PORT = "127.0.0.1", None
# Folders of trained weights are looked into if they exist; the last is the toy's LoRA.
OUTPUTS, RUNS = "outputs/web", ("ckpts", "outputs", "assets/toy_land")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.tool_parser("Serve a page for the browser that samples, compares, and watches training.")
    parser.add_argument(
        "--host", default=HOST, help=f"address to listen on; {HOST}, the default, is this machine alone"
    )
    parser.add_argument("--port", type=int, help="port to listen on; a free one from 7860 on by default")
    parser.add_argument(
        "--outputs", default=OUTPUTS, metavar="FOLDER", help=f"videos and history; {OUTPUTS} by default"
    )
    parser.add_argument("--configs", default="configs", metavar="FOLDER", help="model files and presets")
    parser.add_argument(
        "--runs", nargs="+", metavar="FOLDER", help=f"LoRAs, and trainings to watch; {', '.join(RUNS)} by default"
    )
    parser.add_argument("--data", nargs="+", metavar="FOLDER", default=[], help="clips for training")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it.

    Raises:
        InputError: gradio is missing, a folder does not exist, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs gradio: run make web, or: pip install -e '.[web]'")
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
        address = page.launch(options.host, options.port)
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
