"""URLs of objects in settings: which texts are some, and none with secrets in messages, logs and records."""

import re
from pathlib import Path

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*[^\s'\"<>.,;:)\]]")  # not the mark after it
_QUERY = re.compile(r"[?&#]([^=&#\s]*)(?:=[^&#\s]*)?")
_HARMLESS = frozenset({"download", "raw", "dl", "versionid", "generation"})  # keys of a query that are no secrets
_HIDDEN = "***"
FROM_ENVIRONMENT = (
    "give the address only; credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE; GOOGLE_APPLICATION_CREDENTIALS; HF_TOKEN)"
)


def is_url(text: object) -> bool:
    """Return whether a setting is a URL of fsspec, other than ``file://``, and no name of a file here."""
    return isinstance(text, str) and _URL.match(text) is not None and not text.lower().startswith("file://")


def local_path(text: str | Path) -> Path:
    """Return the path of a file or folder here, which may be written as a ``file://`` URL."""
    return Path(re.sub("(?i)^file://", "", str(text))).expanduser()


def url_problem(url: str) -> tuple[str, str] | None:
    """Return why a URL is refused, without its secrets, and the cure; None if it is not."""
    shown = _without_secrets(url)
    if shown != url:
        return f"is {shown}, and would leave a secret in files and logs", FROM_ENVIRONMENT
    if "::" in url.partition("://")[0]:
        return f"is {url}, a chain of file systems", "give the address of the object alone; it is cached here anyway"
    if not url.partition("://")[2].strip("/"):
        return f"is {url}, which names no object", "give one such as s3://my-bucket/clips"
    return None


def redacted(text: str) -> str:
    """Return a text whose URLs have neither names and passwords before an ``@`` nor values of queries."""
    return _IN_TEXT.sub(lambda found: _without_secrets(found[0]), text)


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    before, at, after = rest.rpartition("@")  # a secret key may have slashes
    if at and (":" in before or (scheme.lower() in ("http", "https") and "/" not in before)):
        rest = f"{_HIDDEN}@{after}"
    path, mark, query = rest.partition("?")
    if mark and any(key.lower() not in _HARMLESS for key in _QUERY.findall(f"?{query}")):
        rest = f"{path}?{_HIDDEN}"
    return f"{scheme}://{rest}"
