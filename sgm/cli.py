"""Parsing, error messages and exit codes of the command lines."""

import argparse
import contextlib
import errno
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sgm.log import configure_logging, is_rank_zero, launcher_note, printable_output
from sgm.project import shipped, started_as

EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 something given is wrong, 128 + n ended by signal n"
TYPED = "COGVIDEOX_COMMAND"  # variable with the command that started a launcher
OUTPUT_OPTIONS = ("out", "output_path", "lora_save_directory")


def parse(
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    examples: Sequence[str],
    check: str,
    card: bool = False,
    training: bool = False,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """Parse a command line; ``section.key=value`` may appear anywhere.

    Args:
        argv: arguments; None takes those of the process.
        prog: name of the script.
        description: of the script.
        examples: commands to show.
        check: help of ``--check``.
        card: whether ``--check`` plans memory, for a ``--card``.
        training: whether the command reads the keys of training, for ``--help``.
        more: adds further options.
    """
    prog = started_as(prog)[-1]
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples), "", EXIT_CODES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", nargs="?", metavar="KEY", help="show this, or explain a key, and exit")
    parser.add_argument(
        "--base",
        nargs="+",
        action="extend",
        metavar="YAML",
        default=[],
        help="files to merge; a later one wins. Words that end in .yaml need no --base",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that override all files")
    parser.add_argument("--seed", type=int, help="short for args.seed=SEED")
    add_trust(parser)
    parser.add_argument("--check", action="store_true", help=check)
    if card:
        kinds = ", or of a name such as h100" if training else ""
        text = f"with --check: plan for a card of this memory, such as 24gb{kinds}"
        parser.add_argument("--card", metavar="SIZE", help=text)
    if card and training:
        text = "with --check: recommend mesh, ZeRO stage and micro batch for so many devices, and predict the speed"
        parser.add_argument("--devices", metavar="NUM", help=text)
    parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    if more is not None:
        more(parser)
    _complete(parser, training=training)
    _help(parser, sys.argv[1:] if argv is None else argv, training=training)
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_keys_for(unknown)}")
    if card and options.card is not None:
        options.card = _card(parser, options, names=training)
    if getattr(options, "devices", None) is not None:
        options.devices = _devices(parser, options)
    is_override = re.compile(r"[A-Za-z_][\w.]*=").match
    moved = [word for word in options.base if is_override(word) and not os.path.exists(word)]
    files = [word for word in options.overrides if word.endswith((".yaml", ".yml")) and not is_override(word)]
    options.base = [word for word in options.base if word not in moved]
    if files and options.base:  # in the order in which they were typed, since the later one wins
        typed = [word.removeprefix("--base=") for word in (sys.argv[1:] if argv is None else argv)]
        files = sorted(options.base + files, key=typed.index)
    options.base = files or options.base
    options.command = os.environ.get(TYPED) or shlex.join([prog, *(sys.argv[1:] if argv is None else argv)])
    options.overrides = moved + [word for word in options.overrides if word not in files]
    if options.seed is not None:
        options.overrides.append(f"args.seed={options.seed}")
    return options


def _help(parser: argparse.ArgumentParser, words: Sequence[str], *, training: bool) -> None:
    """Show the help that a command line asks for, if it does, and exit."""
    if not any(word in ("-h", "--help") or word.startswith("--help=") for word in words):
        return
    from sgm.config import key_help

    asked = key_help.asked_key(words)
    if asked is None:
        sys.stdout.write(f"{parser.format_help()}\n{key_help.listed(training=training)}\n")
        parser.exit()
    text = key_help.explained(asked)
    if text is None:
        close = key_help.nearest(asked)
        hint = f"did you mean {', '.join(close)}?" if close else "--help lists all"
        parser.error(f"there is no key {asked}{_keys_for([f'--{asked}'])}; {hint}")
    sys.stdout.write(f"{text}\n")
    parser.exit()


def write_findings(options: argparse.Namespace, report: str) -> None:
    """Write what a command with ``--check`` found, headed by the command that was typed; on rank zero only."""
    if is_rank_zero():
        sys.stdout.write(f"{options.command}\n{report}\n")


def _keys_for(unknown: Sequence[str]) -> str:
    """Return how to write unknown options that other trainers have."""
    from sgm.config.places import place_of  # after parsing, so that --help is fast

    names = [word.lstrip("-").partition("=")[0].replace("-", "_") for word in unknown if word.startswith("--")]
    homes = [home for name in names if (home := place_of(name, name))]
    return f"; settings are written as {', '.join(f'{home}=...' for home in homes)}" if homes else ""


def _card(parser: argparse.ArgumentParser, options: argparse.Namespace, *, names: bool) -> float | str:
    """Return the GiB of ``--card``; with `names`, a word that is no size as it is."""
    found = re.fullmatch(r"(\d{1,5}(?:\.\d+)?)\s*(?:gi?b?)?", options.card.strip().lower())
    is_size = found is not None and float(found[1]) > 0
    if not is_size and (not names or found is not None):
        parser.error(f"--card {options.card!r} is no size; give the memory of the card, such as --card 24gb")
    if found is not None and float(found[1]) >= 1000:  # a name such as 4090
        parser.error(f"--card {options.card!r}: no card has so much memory; give that of yours, such as --card 24gb")
    if not options.check:
        parser.error("--card only plans: give --check as well")
    return float(found[1]) if found is not None else options.card


def _devices(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Return the number of ``--devices``."""
    if re.fullmatch(r"[1-9]\d{0,4}", options.devices.strip()) is None:
        parser.error(f"--devices {options.devices!r} is no number of devices; give 1 to 99999, such as --devices 64")
    if not options.check:
        parser.error("--devices only plans: give --check as well")
    return int(options.devices)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust``, for commands that read YAML."""
    parser.add_argument(
        "--trust",
        action="append",
        metavar="PACKAGE",
        default=[],
        help="let targets in the YAML run code of this package too; may be repeated",
    )


def _complete(parser: argparse.ArgumentParser, *, training: bool = True, **how: Any) -> None:
    """Answer a shell that asks how the last word may go on, and exit; `how` goes to argcomplete."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete
    from argcomplete.completers import FilesCompleter

    from sgm.config.key_help import completed

    files = FilesCompleter()

    def complete(prefix: str, **_: Any) -> list[str]:
        key, equals, value = prefix.partition("=")
        known = completed(prefix, training=training)
        return known or [f"{key}={file}" if equals else file for file in files(value if equals else prefix)]

    for action in parser._actions:
        if action.dest in ("overrides", "base"):
            action.completer = complete  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, **how)


class _ToolParser(argparse.ArgumentParser):
    """Parser of a tool, whose words may name files that a wheel has installed."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words."""
        if type(self) is _ToolParser:  # not the class that completes them
            _complete(self)
        words = sys.argv[1:] if args is None else list(args)
        writes = [f"--{name}" for name in OUTPUT_OPTIONS]
        before = [None, *words]
        found = [word if last in writes else shipped(word) for last, word in zip(before, words, strict=False)]
        return super().parse_known_args(found, namespace)


def file_size(text: str) -> str:
    """Return the size of a file in the command line, such as ``5GB``, as Hugging Face's libraries read it.

    Raises:
        ArgumentTypeError: it is none.
    """
    found = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([KMGT]B)", text.strip().upper())
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 500MB or 5GB")
    return f"{found[1]}{found[2]}"


def tool_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a tool, with exit codes in its help and ``--debug``; `description` is its docstring."""
    parser = _ToolParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXIT_CODES
    )
    parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    return parser


class Terminated(KeyboardInterrupt):
    """A signal asked this process to end, as Ctrl-C does: what is half done is removed on the way out.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def raise_terminated(number: int, _: object = None) -> None:
    """Signal handler: raise `Terminated`, unless one is being handled, whose clean-up must not be cut short."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Terminated):
            return
        error = error.__context__
    raise Terminated(number)


@contextlib.contextmanager
def _raised_signals() -> Iterator[None]:
    """Context: SIGTERM, SIGUSR1 (of schedulers and containers) and SIGHUP (of closed terminals) raise `Terminated`.

    Signals that are ignored (``nohup``) or handled already stay as they are.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        numbers = []
    raised = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in raised:
        signal.signal(number, raise_terminated)
    try:
        yield
    finally:
        for number in raised:
            signal.signal(number, signal.SIG_DFL)


@printable_output()
def run_command(
    work: Callable[[argparse.Namespace], int | None],
    options: argparse.Namespace,
    *,
    interrupted: str = "interrupted; nothing was written",
    memory_hint: str = "this needs no accelerator",
    output: str = "",
) -> int:
    """Run `work(options)`; return the exit code: 0 done, 1 failed, 2 wrong input, 128 + n after signal n.

    Args:
        work: the command; it may return the exit code of a run that ended well.
        options: from `parse`.
        interrupted: message after Ctrl-C (signal 2), SIGTERM (15), SIGUSR1 (10) or SIGHUP (1).
        memory_hint: cure for an accelerator out of memory.
        output: key that names the output, for messages about files that cannot be written; empty for the option in
            `OUTPUT_OPTIONS`.
    """
    output = output or next((f"--{name}" for name in OUTPUT_OPTIONS if hasattr(options, name)), "")
    with _raised_signals():
        try:
            configure_logging(debug=options.debug)
            if hasattr(options, "trust"):
                from sgm.util import require_packages  # after parsing, so that --help is fast

                require_packages(options.trust)
            return work(options) or 0
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Terminated) else signal.SIGINT
            if is_rank_zero():
                sys.stderr.write(f"{interrupted} ({signal.Signals(number).name}){launcher_note()}\n")
            return 128 + number
        except Exception as error:  # every error becomes one message
            return _report(error, debug=options.debug, memory_hint=memory_hint, output=output)
        finally:
            if "sgm.distributed" in sys.modules:
                sys.modules["sgm.distributed"].shutdown()


def _reports(error: Exception) -> bool:
    """Whether this process reports `error`: before the ranks start, one per machine reports wrong input."""
    from sgm.util import InputError

    distributed: Any = sys.modules.get("sgm.distributed")
    is_first_here = is_rank_zero() or os.environ.get("LOCAL_RANK") == "0"
    return is_first_here or not isinstance(error, InputError) or (distributed is not None and distributed.has_mesh())


def _report(error: Exception, *, debug: bool, memory_hint: str, output: str = "") -> int:
    """Write the error's message; return the exit code."""
    from sgm.config.values import shortened  # after parsing, so that --help is fast
    from sgm.io import OutputError, WriteError, denied_text
    from sgm.util import InputError, RunError

    if debug:
        traceback.print_exception(error)
    if isinstance(error, PermissionError):
        error = InputError(denied_text(error))
    elif isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        error = InputError(f"the path {shortened(str(error.filename))} cannot be used: {error.strerror}; correct it")
    if isinstance(error, InputError | RunError):
        message = str(error)
        if output and isinstance(error, OutputError | WriteError):
            message += f": {output}" if message.endswith("another folder") else f", or choose another folder: {output}"
        if _reports(error):
            sys.stderr.write(f"error: {message}\n")
        return error.exit_code
    hint = f"; {memory_hint}" if type(error).__name__ == "OutOfMemoryError" else ""
    sys.stderr.write(f"error: {type(error).__name__}: {error}{hint} (--debug shows where)\n")
    return 1
