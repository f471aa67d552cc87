"""Objects behind URLs, read with fsspec: a range at a time, again after failures, and kept in a store of this machine.

Credentials are those of the environment, as the library of each protocol finds them.
"""

import contextlib
import hashlib
import io
import posixpath
import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sgm.data.remote.ranges import marks_of_part, read_range
from sgm.data.remote.store import MissingError, RefusedError, RemoteError, Store
from sgm.data.tar import refuse_compressed
from sgm.io import reason_of
from sgm.log import get_logger
from sgm.urls import FROM_ENVIRONMENT, redacted, url_problem
from sgm.util import InputError, RunError

logger = get_logger(__name__)
Result = TypeVar("Result")

EXTRA = "pip install 'cogvideox-sat[remote]'"
_SUFFIX = ".tar"  # of the archives in a folder
THREADS = 16  # requests at a time while shards are looked up
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_SILENCE_S = 60  # without a byte, after which a request failed
_CHANGES = ("ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "Digest", "Last-Modified", "LastModified")
_TIMES = ("last_modified", "mtime", "created")
_MISSING = "there is no such object; correct the URL"
_AGAIN = (408, 425, 429)  # answers of HTTP below 500 after which a request is repeated


@dataclass(frozen=True)
class RemoteFile:
    """An object as it was when it was looked up.

    Attributes:
        url: of it; without secrets.
        size: in bytes.
        fingerprint: its ETag, or what the store has in its place; changes with the content.
        ranges: whether parts of it can be read.
        store: that keeps what was read.
    """

    url: str
    size: int
    fingerprint: str
    ranges: bool
    store: Store

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    @property
    def stamp(self) -> tuple[int, int]:
        """Size, and a number that changes with the content, as for a local file."""
        return self.size, int(hashlib.sha256(self.fingerprint.encode()).hexdigest()[:15], 16)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the object.

        Raises:
            RemoteError: they cannot be read, or the object changed.
        """
        if not size:  # no range of HTTP is empty
            return b""
        with self.store.open(*self._entry(offset, size)) as file:
            file.seek(0 if self.ranges else offset)
            return file.read(size)

    def prefetch(self, offset: int, size: int) -> None:
        """Read what `read` will, so that it is here then; failures are left to `read`, which says and repeats them."""
        key, num_bytes, fetch = replace(self, store=replace(self.store, retries=0))._entry(offset, size)
        if size and not self.store.has(key):
            with contextlib.suppress(RunError, InputError):
                self.store.open(key, num_bytes, fetch).close()

    def open(self, block: int) -> Any:
        """Return the object as a binary file, read in blocks of bytes that are not kept; raises as libraries do."""
        if not self.size:
            return io.BytesIO()
        if not self.ranges:
            return self.store.open(*self._entry(0, self.size))
        system, name = filesystem(self.url)
        file = system.open(name, "rb", block_size=block)
        if file.size != self.size:
            raise OSError(f"it has {file.size:,} bytes, and had {self.size:,}")
        return file

    def _entry(self, offset: int, size: int) -> tuple[str, int, Callable[[Path], None]]:
        """Return key, size and source of what the store keeps: a range, or the object where there are no ranges."""
        start, stop = (offset, offset + size) if self.ranges else (0, self.size)
        key = f"{self.url} {self.fingerprint} {self.size} {start} {stop}"
        return key, stop - start, lambda path: self._fetch(start, stop, path)

    def _fetch(self, start: int, stop: int, path: Path) -> None:
        def work() -> None:
            system, name = filesystem(self.url)
            content = read_range(system, name, self.url, start, stop, self._told) if self.ranges else None
            if content is None:
                system.invalidate_cache()
                now = _described(self.url, system.info(name), self.store)
                self._require((now.size, now.fingerprint) == (self.size, self.fingerprint))
                if not self.ranges:
                    system.get_file(name, str(path))
                    _require_whole(path.stat().st_size, self.size)
                    return
                content = system.cat_file(name, start=start, end=stop)
            _require_whole(len(content), stop - start)
            with path.open("r+b") as file:
                file.write(content)

        retried(self.url, self.store.retries, work)

    def _told(self, size: int | None, marks: Mapping[str, str]) -> bool:
        """Return whether an answer tells which version it is of, by the size and the marks of the whole object.

        Raises:
            RemoteError: it is of another one.
        """
        then = f" {self.fingerprint} "
        known = [f" {name}={mark} " for name, mark in marks.items() if f" {name}=" in then]
        self._require(size in (None, self.size) and all(mark in then for mark in known))
        return bool(known)

    def _require(self, unchanged: bool) -> None:
        if not unchanged:
            raise RemoteError(
                f"{self.url} changed since this run looked it up; start again (args.resume=auto goes on from the "
                "last checkpoint), and leave the shards of a run as they are"
            )


def _require_whole(got: int, size: int) -> None:
    if got != size:
        raise OSError(f"the answer ended early, or had another part: {got:,} of {size:,} bytes")


def filesystem(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, made in this process, and the object's name in it.

    Raises:
        InputError: the URL is refused, its protocol is unknown, or the protocol's library is not installed.
    """
    import fsspec
    from fsspec.registry import known_implementations

    if problem := url_problem(url):
        raise InputError(f"the URL {problem[0]}; {problem[1]}")
    protocol = url.partition("://")[0].lower()
    try:
        return fsspec.core.url_to_fs(url, **_options(protocol))
    except ImportError as error:
        library = known_implementations.get(protocol, {}).get("err", str(error))
        raise InputError(f"{url}: a library for {protocol}:// is missing ({library}); {EXTRA}") from error
    except ValueError as error:
        known = "s3, gs, hf, https, http, memory, file"
        raise InputError(f"{url}: {redacted(str(error))}; give a URL of {known}, or a folder here") from None


def _options(protocol: str) -> dict[str, Any]:
    """Return the options of a file system that decide when a silent server has failed."""
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
        return {"client_kwargs": {"timeout": timeout}}
    if protocol in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": _SILENCE_S, "read_timeout": _SILENCE_S}}
    return {}


def look_up(url: str, store: Store) -> RemoteFile:
    """Return an object, by its size and fingerprint; `store` keeps what is read of it.

    Raises:
        RemoteError: it does not exist, or cannot be reached.
    """

    def work() -> RemoteFile:
        system, name = filesystem(url)
        info = system.info(name)
        if not url.lower().startswith(("http://", "https://")):
            return _described(url, info, store)
        marks = marks_of_part(system, name)  # those of parts, which some servers make in another way
        return replace(_described(url, {**info, **(marks or {})}, store), ranges=marks is not None)

    found = retried(url, store.retries, work)
    if not found.fingerprint:
        _warn_of_no_version(root_of(url), store.folder)
    return found


@cache
def _warn_of_no_version(root: str, folder: Path) -> None:
    text = (
        "the server of %s names no version of its files (ETag, Last-Modified): what %s keeps of one is used while its"
    )
    logger.warning(f"{text} size stays; delete that folder after a change", root, folder)


def _described(url: str, info: Mapping[str, Any], store: Store) -> RemoteFile:
    if info.get("size") is None:
        raise RefusedError(f"{url}: the server does not say its size; serve it with a Content-Length")
    content = [f"{name}={info[name]}" for name in _CHANGES if info.get(name)]
    times = [f"{name}={info[name]}" for name in _TIMES if info.get(name)]
    return RemoteFile(url, int(info["size"]), " ".join(content or times), True, store)


def root_of(url: str) -> str:
    """Return the folder of the objects that a URL names, see `expanded`."""
    scheme, _, rest = url.rstrip("/").partition("://")
    parts = rest.split("/")
    fixed = next((place for place, part in enumerate(parts) if set(part) & set("*{[")), len(parts))
    if fixed == len(parts) and rest.lower().endswith(_SUFFIX):
        fixed -= 1
    return f"{scheme}://{'/'.join(parts[:fixed])}"


def expanded(url: str, retries: int) -> list[str]:
    """Return the URLs of the archives that a URL names, in order.

    Args:
        url: of an object, or a folder; or with ``{000..099}``, ``{a,b}`` or ``*`` in its place.
        retries: how often a request that failed is repeated.

    Raises:
        InputError: a folder holds compressed archives, or braces are wrong.
        RemoteError: it cannot be listed.
    """
    import braceexpand

    root, url = root_of(url), url.rstrip("/")
    if root == url:
        inside = _matching(root, f"{root}/*", retries)
        refuse_compressed(root, inside)
        return [each for each in inside if each.lower().endswith(_SUFFIX)]
    found: list[str] = []
    try:
        patterns = list(braceexpand.braceexpand(url)) if "{" in url else [url]
    except ValueError as error:
        raise InputError(f"{url}: {reason_of(error).partition(':')[0].lower()}; write them as {{000..099}}") from None
    for pattern in patterns:
        found += _matching(root, pattern, retries) if "*" in pattern or "[" in pattern else [pattern]
    return list(dict.fromkeys(found))


def _matching(root: str, pattern: str, retries: int) -> list[str]:
    def work() -> list[str]:
        system, name = filesystem(pattern)
        system.invalidate_cache()
        inside = system._strip_protocol(root).rstrip("/")
        names = (str(each).removeprefix(f"{inside}/") for each in system.glob(name))
        return sorted(f"{root}/{each}" for each in names if not posixpath.basename(each).startswith("."))

    return retried(pattern, retries, work)


def each_looked_up(urls: list[str], store: Store) -> list[RemoteFile]:
    """Return objects, looked up several at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda url: look_up(url, store), urls))


def retried(url: str, retries: int, work: Callable[[], Result]) -> Result:
    """Return the result of `work`, done again after failures that may pass, after growing pauses.

    Raises:
        RefusedError: it failed for good.
        RemoteError: it failed too often.
    """
    for attempt in range(1, retries + 2):
        try:
            return work()
        except (RunError, InputError):
            raise
        except Exception as error:  # each library has errors of its own
            said = _said(error)
            if cure := _cure(url, error):
                kind = MissingError if cure == _MISSING else RefusedError
                raise kind(f"{url}: {said}; {cure}") from None  # the message of the cause may have a signed address
            if attempt > retries:
                raise RemoteError(
                    f"{url}: {attempt} attempts failed, the last one: {said}; see that the network and the server "
                    "work, and repeat the command (args.remote_retries sets the attempts)"
                ) from None
            pause = min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S)
            pause *= random.SystemRandom().uniform(0.75, 1.25)  # apart from training's random numbers
            text = "%s: attempt %d of %d failed: %s; the next one in %.1f s"
            logger.warning(text, url, attempt, retries + 1, said, pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _said(error: Exception) -> str:
    """Return what an error says, on one line, without secrets."""
    last: Any = [*_causes(error)][-1]
    text = redacted(" ".join(reason_of(last).split())) or type(last).__name__
    return text if type(last).__name__ in text else f"{type(last).__name__}: {text}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__  # type: ignore[assignment]


def _status(error: BaseException) -> int | None:
    """Return the status of HTTP that an error of aiohttp, botocore, gcsfs or huggingface_hub is about."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if type(error) is OSError and str(error).startswith("Forbidden: "):  # gcsfs
        return 403
    own = "code" if type(error).__module__.startswith("gcsfs") else "status"  # aiohttp has codes for broken answers
    found = getattr(error, own, None) or getattr(response, "status_code", None)
    return found if isinstance(found, int) else None


def _cure(url: str, error: Exception) -> str:
    """Return what to do about a failure that will not pass; empty if it may."""
    causes = list(_causes(error))
    status = next((found for cause in causes if (found := _status(cause))), None)
    names = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    if status in (401, 403) or isinstance(causes[-1], PermissionError) or any("Credential" in name for name in names):
        if url.startswith("http"):
            return "the server wants credentials, and none are sent; use a protocol that takes them, such as s3://"
        return f"the credentials lack this right, or there are none: {FROM_ENVIRONMENT}"
    if status is not None:
        if status >= 500 or status in _AGAIN:
            return ""
        return _MISSING if status == 404 else "correct the URL"
    last = causes[-1]
    if isinstance(last, FileNotFoundError):
        return _MISSING
    if isinstance(last, IsADirectoryError | NotADirectoryError):
        return "give the folder without a suffix, or an object in it"
    if isinstance(last, NotImplementedError | ValueError | TypeError):
        return "correct the URL"
    return ""
