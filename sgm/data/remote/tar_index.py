"""The members of an archive afar: looked up once, and kept beside the store until the archive changes.

The index has the content of small members that are no clips, so that captions are not read one by one in every run.
"""

import base64
import hashlib
from collections.abc import Iterator
from typing import Any

from sgm.data.remote.objects import RemoteFile, retried
from sgm.data.rows import PICTURE_SUFFIXES, VIDEO_SUFFIXES, suffix
from sgm.data.tar import ArchiveError, files_of
from sgm.io import parse_json, write_json
from sgm.log import get_logger

logger = get_logger(__name__)

_VERSION = 2  # increment when the file changes
_SMALL = 1 << 16  # bytes of a member that the index holds
_BLOCK = 1 << 18  # bytes of a request while headers are read

Member = tuple[str, int, int, bytes | None]  # name, offset and size in bytes, content


def members_of(archive: RemoteFile) -> Iterator[Member]:
    """Yield the files of an archive.

    Raises:
        RemoteError: it cannot be read.
        ArchiveError: it is no archive, or is compressed, damaged or cut.
    """
    name = hashlib.sha256(archive.url.encode()).hexdigest()[:40]
    path = archive.store.folder / "index" / f"{name}.json"
    identity = {"version": _VERSION, "url": archive.url, "size": archive.size, "fingerprint": archive.fingerprint}
    with archive.store.locked(f"index-{name[:3]}"):
        try:
            content = parse_json(path.read_bytes())
            if {key: content.get(key) for key in identity} == identity:
                return iter([(*member, _decoded(text)) for *member, text in content["members"]])  # type: ignore[misc]
            logger.info("%s changed since it was looked up; it is again", archive.url)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s cannot be read and is written again: %s", path, error)
        found = retried(archive.url, archive.store.retries, lambda: _read(archive))
        if isinstance(found, ArchiveError):
            raise found
        kept = [(*member, None if text is None else base64.b64encode(text).decode()) for *member, text in found]
        write_json(path, {**identity, "members": kept})
    return iter(found)


def _decoded(text: Any) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def _read(archive: RemoteFile) -> list[Member] | ArchiveError:
    """Read the headers and the small members; return an error of the archive, which another attempt would not mend."""
    found: list[Member] = []
    with archive.open(_BLOCK) as file:
        try:
            for name, offset, size in files_of(file):
                text = None
                if size <= _SMALL and suffix(name) not in VIDEO_SUFFIXES + PICTURE_SUFFIXES:
                    file.seek(offset)
                    text = file.read(size)
                    if len(text) != size:
                        raise OSError("the answer ended early")
                found.append((name, offset, size, text))
        except ArchiveError as error:
            return error
    return found
