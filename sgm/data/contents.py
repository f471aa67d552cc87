"""What the files of clips hold, so that a clip that was replaced under its name is not taken for the one encoded.

A stamp is the modification time of a file and a digest of its content. Where the time is that of the stamp, the content
is not read; where it differs, as in a copy of a data set, the content decides. Times are read anew by each method:
encoding takes hours, in which files change.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sgm.data.clips.index import stamps
from sgm.data.formats.webdataset import Member
from sgm.data.rows import ClipFile
from sgm.io import content_digest, range_digest

_THREADS = 16  # that read files, which may be on a network
# What is read of a file: all of a smaller one, and both ends and some pages of a larger one.
_SAMPLED = {"whole": 1 << 17, "ends": 1 << 16, "pieces": 8}


class Contents:
    """The files of the results of a cache.

    Args:
        files: key of a result → its files; those afar have no stamps.
    """

    def __init__(self, files: Mapping[str, Sequence[ClipFile]]) -> None:
        self._files = files

    def stamps(self, keys: Iterable[str]) -> dict[str, str]:
        """Return key → stamp of a result's files; empty if there is none."""
        times_of = self._times()
        return {key: self._stamp(key, times_of(key)) for key in keys}

    def changed(self, recorded: Mapping[str, str]) -> list[str]:
        """Return the keys whose files hold something else than their stamps say; missing and empty ones say nothing."""
        asked = [key for key in recorded if recorded[key] and key in self._files]
        times_of = self._times()
        with ThreadPoolExecutor(_THREADS) as pool:
            kept = pool.map(lambda key: self._is_same(key, recorded[key], times_of(key)), asked)
            return [key for key, same in zip(asked, kept, strict=True) if not same]

    def _stamp(self, key: str, times: Sequence[str]) -> str:
        digest = self._digest(key)
        return f"{','.join(times)} {digest}" if times and all(times) and digest else ""

    def _is_same(self, key: str, recorded: str, now: Sequence[str]) -> bool:
        times, _, digest = recorded.partition(" ")
        return times == ",".join(now) or digest == self._digest(key)

    def _times(self) -> Callable[[str], list[str]]:
        """Return a function from keys to the times of their files, each read once."""
        stamp_of = stamps()

        def time(file: ClipFile) -> str:
            stamp = stamp_of(file)
            return str(stamp[1]) if isinstance(stamp, tuple) else ""  # of an object afar, its version

        return lambda key: [time(file) for file in self._files.get(key, ())]

    def _digest(self, key: str) -> str:
        return "-".join(map(_digest, self._files.get(key, ())))


def _digest(file: ClipFile) -> str:
    """Return a digest of the content of a file, or of a file inside another one; empty if it cannot be read."""
    try:
        if isinstance(file, Path):
            return content_digest(file, **_SAMPLED)
        if isinstance(file, Member) and isinstance(file.container, Path):  # a touched archive is not read whole
            with file.container.open("rb") as archive:
                return range_digest(archive, file.offset, file.size, **_SAMPLED)
        if isinstance(file.container, Path):
            return hashlib.sha256(file.read()).hexdigest()[:16]
    except OSError:
        pass
    return ""
