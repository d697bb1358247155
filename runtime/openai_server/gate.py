"""What every request passes before it is read: the server's name and key, the limits of its body, whether the server
still takes it.
"""

from __future__ import annotations

import asyncio
import hmac
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimode.runtime.openai_server.http_errors import (
    BODY_TIMEOUT,
    BODY_TOO_LARGE,
    SHUTTING_DOWN,
    UNAUTHORIZED,
    WRONG_HOST,
    ApiError,
    respond,
)

# Answered without a key: the page, which asks for one, and whether the server is up.
OPEN_PATHS = frozenset({"/", "/playground.css", "/playground.js", "/health"})
BODY_SECONDS = 30.0
LOOPBACK_NAMES = frozenset({b"localhost", b"127.0.0.1", b"[::1]"})


class Gate:
    """ASGI middleware. ``active``: requests that are being answered. ``draining``: refuse what comes, with 503.

    loopback_only: refuse what was asked under another name than those of the loopback interface. A page from elsewhere,
    whose own name was made to point there, asks under that name.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body: int,
        loopback_only: bool = False,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_body = max_body
        self._loopback_only = loopback_only
        self._body_seconds = body_seconds
        self.active = 0
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if refusal := self._refusal(scope["path"], headers):
            response = respond(refusal)
            response.headers["connection"] = "close"  # the body stays unread
            await response(scope, receive, send)
            return
        self.active += 1
        try:
            await self._app(scope, self._bounded(receive), send)
        finally:
            self.active -= 1

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self.draining:
            return ApiError(SHUTTING_DOWN, "the server is shutting down; ask another, or later")
        if self._loopback_only and _name(headers.get(b"host", b"")) not in LOOPBACK_NAMES:
            return ApiError(WRONG_HOST, "this server has no API key, and answers under the name localhost alone")
        given = headers.get(b"authorization", b"")
        if self._key is not None and path not in OPEN_PATHS and not hmac.compare_digest(given, self._key):
            return ApiError(UNAUTHORIZED, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(BODY_TOO_LARGE, f"the body is longer than {self._max_body} bytes, the limit of this server")

    def _bounded(self, receive: Receive) -> Receive:
        """``receive`` with the body's limits of size and time; afterwards it only tells that the client has left."""
        deadline = asyncio.get_running_loop().time() + self._body_seconds
        size, whole = 0, False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(BODY_TIMEOUT, f"the body did not come within {self._body_seconds:.0f} s") from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if size > self._max_body:
                    raise self._too_large()
            return message

        return bounded


def _name(host: bytes) -> bytes:
    """Without the port."""
    return re.sub(rb":\d*$", b"", host).lower()
