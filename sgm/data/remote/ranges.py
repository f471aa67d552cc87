"""Parts of objects with one request each: the answer says itself which version of the object it is of.

fsspec's file systems return bytes alone, so the requests of HTTP and S3 are made here, in the sessions of fsspec.
"""

from collections.abc import Callable, Mapping
from typing import Any

Told = Callable[[int | None, Mapping[str, str]], bool]
MARKS = ("ETag", "Last-Modified")  # of HTTP, under the names in fsspec's descriptions of objects


def marks_of_part(system: Any, name: str) -> Mapping[str, str] | None:
    """Ask a server of HTTP for one byte; return the marks of the object, or None if the server sends all.

    Some servers that send parts do not say so.
    """

    async def ask() -> Mapping[str, str] | None:
        session = await system.set_session()
        async with session.get(system.encode_url(name), headers=_headers(0, 1)) as answer:
            answer.raise_for_status()
            return _marks(answer.headers) if answer.status == 206 else None

    return _wait(system, ask)


def read_range(system: Any, name: str, url: str, start: int, stop: int, told: Told) -> bytes | None:
    """Return bytes of an object; None if that takes another request, to learn of which version they are.

    Args:
        system: of fsspec.
        name: of the object in it.
        url: of the object.
        start: first byte.
        stop: after the last byte.
        told: gets the object's size, None if unknown, and its marks; returns whether they tell the version. Called
            before the bytes are read.
    """
    work = _READERS.get(url.partition("://")[0].lower())
    return _wait(system, work, system, name, start, stop, told) if work is not None and stop > start else None


def _wait(system: Any, work: Callable[..., Any], *args: Any) -> Any:
    from fsspec.asyn import sync

    return sync(system.loop, work, *args)


async def _read_http(system: Any, name: str, start: int, stop: int, told: Told) -> bytes | None:
    session = await system.set_session()
    async with session.get(system.encode_url(name), headers=_headers(start, stop)) as answer:
        answer.raise_for_status()
        is_told = told(_size(answer.headers.get("Content-Range"), start), _marks(answer.headers))
        return await answer.read() if is_told else None


async def _read_s3(system: Any, name: str, start: int, stop: int, told: Told) -> bytes | None:
    bucket, key, version = system.split_path(name)
    which = {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})
    answer = await system._call_s3("get_object", Range=f"bytes={start}-{stop - 1}", **which)
    try:
        is_told = told(_size(answer.get("ContentRange"), start), {"ETag": answer["ETag"]} if answer.get("ETag") else {})
        return await answer["Body"].read() if is_told else None
    finally:
        answer["Body"].close()


_READERS: Mapping[str, Callable[..., Any]] = {
    "http": _read_http,
    "https": _read_http,
    "s3": _read_s3,
    "s3a": _read_s3,
}


def _headers(start: int, stop: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}


def _marks(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in MARKS if headers.get(name)}


def _size(content_range: str | None, start: int) -> int | None:
    """Return the size of an object from ``bytes 0-9/100``, of a part that begins at `start`; None where it is not said.

    Raises:
        OSError: it is another part.
    """
    part, _, size = (content_range or "").rpartition("/")
    first = part.rpartition(" ")[2].partition("-")[0]
    if first.isdigit() and int(first) != start:
        raise OSError(f"the answer has another part, from byte {int(first):,} instead of {start:,}")
    return int(size) if size.isdigit() else None
