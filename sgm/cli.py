"""Parsing, error messages and exit codes of the command lines."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from sgm.log import configure_logging, is_rank_zero, printable_output

EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 something given is wrong"


def parse(
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    examples: Sequence[str],
    check: str,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """Parse a command line; ``section.key=value`` may appear anywhere.

    Args:
        argv: arguments; None takes those of the process.
        prog: name of the script.
        description: of the script.
        examples: commands to show.
        check: help of ``--check``.
        more: adds further options.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples), "", EXIT_CODES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--base", nargs="+", action="extend", metavar="YAML", default=[], help="files to merge; a later one wins"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that override all files")
    parser.add_argument("--seed", type=int, help="short for args.seed=SEED")
    add_trust(parser)
    parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    if more is not None:
        more(parser)
    options = parser.parse_intermixed_args(argv)
    is_override = re.compile(r"[A-Za-z_][\w.]*=").match
    moved = [word for word in options.base if is_override(word) and not os.path.exists(word)]
    options.base = [word for word in options.base if word not in moved]
    options.overrides = moved + options.overrides
    if options.seed is not None:
        options.overrides.append(f"args.seed={options.seed}")
    return options


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust``, for commands that read YAML."""
    parser.add_argument(
        "--trust",
        action="append",
        metavar="PACKAGE",
        default=[],
        help="let targets in the YAML run code of this package too; may be repeated",
    )


def tool_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a tool, with exit codes in its help and ``--debug``; `description` is its docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXIT_CODES
    )
    parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    return parser


@printable_output()
def run_command(
    work: Callable[[argparse.Namespace], None],
    options: argparse.Namespace,
    *,
    interrupted: str = "interrupted; nothing was written",
    memory_hint: str = "this needs no accelerator",
) -> int:
    """Run `work(options)`; return the exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted.

    Args:
        work: the command.
        options: from `parse`.
        interrupted: message after an interrupt.
        memory_hint: cure for an accelerator out of memory.
    """
    try:
        configure_logging(debug=options.debug)
        if hasattr(options, "trust"):
            from sgm.util import set_trusted  # after parsing, so that --help is fast

            set_trusted(options.trust)
        work(options)
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        return 130
    except Exception as error:  # every error becomes one message
        return _report(error, debug=options.debug, memory_hint=memory_hint)
    finally:
        if "sgm.distributed" in sys.modules:
            sys.modules["sgm.distributed"].shutdown()
    return 0


def _reports(error: Exception) -> bool:
    """Whether this process reports `error`: before the ranks start, one per machine reports wrong input."""
    from sgm.util import InputError

    distributed: Any = sys.modules.get("sgm.distributed")
    is_first_here = is_rank_zero() or os.environ.get("LOCAL_RANK") == "0"
    return is_first_here or not isinstance(error, InputError) or (distributed is not None and distributed.has_mesh())


def _report(error: Exception, *, debug: bool, memory_hint: str) -> int:
    """Write the error's message; return the exit code."""
    from sgm.util import InputError, RunError  # after parsing, so that --help is fast

    if debug:
        traceback.print_exception(error)
    if isinstance(error, InputError | RunError):
        if _reports(error):
            sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    hint = f"; {memory_hint}" if type(error).__name__ == "OutOfMemoryError" else ""
    sys.stderr.write(f"error: {type(error).__name__}: {error}{hint} (--debug shows where)\n")
    return 1
