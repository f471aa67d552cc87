"""Weights files read into the host's page cache by a thread, while something else is done.

Weights are mapped into memory, and their pages read when they are used. A sampling run encodes its prompts before it
loads the network; the disk would have nothing to do meanwhile.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sgm.log import get_logger
from sgm.util import InputError
from sgm.weights.files import find_weights, shard_files

logger = get_logger(__name__)

_PIECE = 2**23  # bytes that are read at once
_MEMORY = Path("/proc/meminfo")  # of Linux; elsewhere nothing is read ahead


@contextmanager
def reading_ahead(loads: Sequence[str | Path]) -> Iterator[None]:
    """Read checkpoints into the page cache during the block, at the end of which reading stops.

    Nothing is read if the files take more than half of the memory that the host has available: others, such as the text
    encoder, need the rest. A file that cannot be read is left to the one who loads it, who says what is wrong.

    Args:
        loads: files or folders, see `find_weights`.
    """
    try:
        files = [file for load in loads for file in shard_files(find_weights(load))]
        size = sum(file.stat().st_size for file in files)
    except (OSError, InputError):
        files, size = [], 0
    if not files or 2 * size > _available():
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_read, args=(files, stop), name="read ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _available() -> int:
    """Return the bytes of memory that the host can give without swapping; 0 if unknown."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMORY.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _read(files: Sequence[Path], stop: threading.Event) -> None:
    buffer = bytearray(_PIECE)  # the bytes are dropped: their pages stay
    for file in files:
        try:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    if stop.is_set():
                        return
        except OSError:
            continue
    logger.debug("read ahead: %s", ", ".join(map(str, files)))
