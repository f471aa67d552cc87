"""What a terminal shows: one logger, on rank zero, dependencies' errors only, and no control characters of others."""

import contextlib
import datetime
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Self, TextIO

from sgm.urls import redacted

# Control characters, line separators, marks that reverse the direction of text, and bytes of names that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LINE_SECONDS = 60.0  # between lines of `bar`
_TO_UPPER_BAR = re.compile(r"(\x1b\[A)+")  # a whole write of tqdm: the cursor goes to the progress bar above


def printable(text: str) -> str:
    """Return text with its control characters escaped, as in Python's literals; tabs and line breaks stay.

    File names, captions, prompts and YAML come from others: on a terminal, an escape sequence in them could move the
    cursor, hide text, or send input to the shell.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def control_characters(text: str) -> str:
    """Return the characters of `text` that `printable` escapes, each once; empty without any."""
    return ", ".join(printable(mark) for mark in dict.fromkeys(_UNPRINTABLE.findall(text)))


class _PrintableStream:
    """A text stream whose writes pass `redacted`, `printable` and its encoding; all else is that of the stream."""

    def __init__(self, stream: TextIO, *, has_bars: bool) -> None:
        self._stream, self._has_bars = stream, has_bars

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text. Of standard error, tqdm's own control characters remain: those that redraw its bars."""
        start = "\r" if self._has_bars and text.startswith("\r") else ""
        if not (self._has_bars and _TO_UPPER_BAR.fullmatch(text)):
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            shown = printable(redacted(text[len(start) :])).encode(encoding, "backslashreplace").decode(encoding)
            text = start + shown
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Context in which everything that is printed passes `printable`: messages, errors, tracebacks, warnings."""
    before = sys.stdout, sys.stderr
    sys.stdout = _PrintableStream(before[0], has_bars=False)  # type: ignore[assignment]
    sys.stderr = _PrintableStream(before[1], has_bars=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _PrintableFormatter(logging.Formatter):
    """Escapes messages, those too that start like a redrawn progress bar; URLs lose their secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message of a record."""
        return printable(redacted(super().format(record)))


def get_logger(name: str = "sgm") -> logging.Logger:
    """Return the package's logger, or a child of it for a module's ``__name__``."""
    return logging.getLogger(name if name.split(".")[0] == "sgm" else f"sgm.{name}")


def is_rank_zero() -> bool:
    """Whether this process is rank zero, from the launcher's environment (true without a launcher)."""
    return os.environ.get("RANK", "0") == "0"


def launcher_note() -> str:
    """Return what to know of the end of a run that a signal stops: torchrun shows a traceback; empty without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return "; torchrun ends with a traceback of its own (SignalException), which is no error of the run"


def warn_once(logger: logging.Logger, warnings: Iterable[str]) -> None:
    """Log warnings common to all ranks, from rank zero only."""
    if is_rank_zero():
        for warning in warnings:
            logger.warning("%s", warning)


def configure_logging(*, debug: bool = False) -> None:
    """Send the package's messages to standard error, from rank zero only; see `every_rank_warns`.

    Dependencies that log at import (SwissArmyTransformer, DeepSpeed, missing kernels) log errors only.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(levelname)s %(message)s" if debug else "%(message)s"))
    logger = logging.getLogger("sgm")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if debug else logging.INFO if is_rank_zero() else logging.ERROR)
    if not debug:
        quiet_dependencies()


def bar(
    items: Iterable[Any] | None = None,
    what: str = "",
    *,
    total: int | None = None,
    leave: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Any:
    """Return a progress bar of tqdm; where there is no terminal, what writes a line each minute. On rank zero only.

    Args:
        items: to iterate over, instead of calling `update`.
        what: is counted.
        total: of how many; None: those of `items`.
        leave: whether the finished bar stays on the terminal.
        clock: in seconds.
    """
    from tqdm import tqdm  # lazy: --help needs none

    number = len(items) if total is None and isinstance(items, Collection) else total or 0
    if is_rank_zero() and number and not sys.stderr.isatty():
        return _Lines(items, what, number, clock)
    shown = is_rank_zero() and number > 0
    return tqdm(items, desc=what, total=number, leave=leave, disable=None if shown else True)


class _Lines:
    """Lines in the place of a bar: how much is done, and the time left."""

    def __init__(self, items: Iterable[Any] | None, what: str, total: int, clock: Callable[[], float]) -> None:
        self._items, self._what, self._clock = items, what, clock
        self.n, self.total = 0, total
        self._began = self._said = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        for item in self._items or ():
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        """Count; write a line if the last one is a minute old."""
        self.n += n
        now = self._clock()
        if now - self._said >= LINE_SECONDS:
            self._said = now
            left = datetime.timedelta(seconds=round((now - self._began) / max(self.n, 1) * (self.total - self.n)))
            get_logger(__name__).info("%s: %d of %d, about %s left", self._what, self.n, self.total, left)

    def close(self) -> None:
        """Write nothing more."""


def every_rank_warns() -> None:
    """Let ranks other than zero warn too: call it once all have checked the same configuration, with one result."""
    logger = get_logger()
    logger.setLevel(min(logger.level, logging.WARNING))


def quiet_dependencies() -> None:
    """Limit logs of SwissArmyTransformer, DeepSpeed, transformers and torchao to errors."""
    os.environ.setdefault("SAT_LOGLEVEL", "ERROR")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("sat", "DeepSpeed", "transformers", "torch.distributed", "torchao", "torch.utils._pytree"):
        logger = logging.getLogger(name)
        if logger.level != logging.ERROR:  # setting a level visits all loggers there are
            logger.setLevel(logging.ERROR)
