"""Which browser a request comes from: a cookie, so that a reload, or the next day, finds what it has made."""

import hashlib
import ipaddress
import secrets
from typing import Any

from starlette.requests import HTTPConnection

COOKIE = "cogvideox-browser"
_LASTING = f"Max-Age={365 * 24 * 3600}; Path=/; HttpOnly; SameSite=Lax"


class Browsers:
    """ASGI middleware that gives a browser its cookie with the page: a random number, which nobody can guess."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["path"] != "/" or COOKIE in HTTPConnection(scope).cookies:
            return await self.app(scope, receive, send)

        async def with_cookie(message: Any) -> None:
            if message["type"] == "http.response.start":
                cookie = f"{COOKIE}={secrets.token_urlsafe(32)}; {_LASTING}"
                message = {**message, "headers": [*message["headers"], (b"set-cookie", cookie.encode())]}
            await send(message)

        await self.app(scope, receive, with_cookie)


def owner_of(request: Any) -> str:
    """Return who asks: the browser, or only its window without a cookie. It is a digest, which may be written down."""
    cookie = (request.cookies or {}).get(COOKIE)
    known = f"window {request.session_hash}" if cookie is None else f"browser {cookie}"
    return hashlib.sha256(known.encode()).hexdigest()


def is_near(request: Any) -> bool:
    """Whether a request comes from this machine."""
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except (AttributeError, ValueError):  # no address: a test client, a socket file
        return False
