"""The command line of ``sample_video.py``."""

import argparse
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from sgm.log import configure_logging, get_logger, is_rank_zero

DESCRIPTION = "Sample videos from a SAT checkpoint, as YAML files say."
EPILOG = """examples:
  python sample_video.py --base configs/toy.yaml configs/toy_inference.yaml
  python sample_video.py --base configs/cogvideox_5b.yaml configs/inference.yaml args.load=FOLDER args.seed=7
  python sample_video.py --base configs/cogvideox_5b.yaml configs/inference.yaml --check

exit codes: 0 done, 1 the run failed, 2 something given is wrong"""

logger = get_logger(__name__)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``section.key=value`` may stand anywhere."""
    parser = argparse.ArgumentParser(
        prog="sample_video.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--base", nargs="+", action="extend", metavar="YAML", default=[], help="files to merge; a later one wins"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over all files")
    parser.add_argument("--seed", type=int, help="short for args.seed=SEED")
    parser.add_argument("--check", action="store_true", help="check everything, read no weights, sample nothing")
    parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    options = parser.parse_intermixed_args(argv)
    is_override = re.compile(r"[A-Za-z_][\w.]*=").match
    moved = [word for word in options.base if is_override(word) and not Path(word).exists()]
    options.base = [word for word in options.base if word not in moved]
    options.overrides = moved + options.overrides
    if options.seed is not None:
        options.overrides.append(f"args.seed={options.seed}")
    return options


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    from sgm.config import load_config  # after parsing, so that --help answers at once

    config = load_config(options.base, options.overrides, mode="inference")
    if options.check:
        from sgm.inference.prepare import prepare

        report, _ = prepare(config)
        sys.stdout.write(report + "\n")
        return
    from sgm.inference.run import sample

    summary = sample(config)
    logger.info("%s", summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 failed, 2 wrong input."""
    options = parse(argv)
    try:
        configure_logging(debug=options.debug)
        run(options)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; finished results stay, and the same command goes on from there\n")
        return 130
    except Exception as error:  # whatever it is, a person reads one message
        return _report(error, debug=options.debug)
    finally:
        if "sgm.distributed" in sys.modules:
            sys.modules["sgm.distributed"].shutdown()
    return 0


def _report(error: Exception, *, debug: bool) -> int:
    """Say what went wrong; return the exit code."""
    from sgm.util import InputError, RunError

    if debug:
        traceback.print_exception(error)
    if isinstance(error, InputError | RunError):
        if is_rank_zero() or isinstance(error, RunError):  # all ranks read the same input
            sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    hint = ""
    if type(error).__name__ == "OutOfMemoryError":
        hint = "; lower args.batch_size or the size, or set args.vae_tiling=true"
    sys.stderr.write(f"error: {type(error).__name__}: {error}{hint} (--debug shows where)\n")
    return 1
