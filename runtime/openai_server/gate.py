"""Checks before a request is read: host name, API key, limits of the body, and whether the server still accepts it."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
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

HEALTH = "/health"
# These need no API key: the playground, which asks for one, and the health check.
OPEN_PATHS = frozenset({"/", "/playground.css", "/playground.js", HEALTH})
BODY_SECONDS = 30.0


class Gate:
    """ASGI middleware. ``active``: requests in progress. ``draining``: refuse new requests with 503.

    this_machine_only: DNS-rebinding protection. A page of another site can make its own host name point to this
    machine, but it cannot change the ``Host`` header. Accept ``localhost``, IP addresses and no header; health checks
    are accepted under any name.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body: int,
        this_machine_only: bool = False,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._max_body = max_body
        self._this_machine_only = this_machine_only
        self._body_seconds = body_seconds
        self.active = 0
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if refusal := self._refusal(scope["path"], dict(scope["headers"])):
            response = respond(refusal, scope["path"])
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
            return ApiError(SHUTTING_DOWN, "the server is shutting down; retry later or use another server")
        if self._this_machine_only and path != HEALTH and not _is_this_machine(headers.get(b"host", b"")):
            return ApiError(
                WRONG_HOST, "this server has no API key and accepts requests to localhost or an IP address only"
            )
        if self._key is not None and path not in OPEN_PATHS and not self._has_key(headers):
            return ApiError(UNAUTHORIZED, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body:
            return self._too_large()
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        """The scheme's name has no case; the key is compared in constant time. ``x-api-key`` is Anthropic's header."""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        sent = key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        return hmac.compare_digest(sent, self._key or b"")

    def _too_large(self) -> ApiError:
        return ApiError(BODY_TOO_LARGE, f"the body is longer than {self._max_body} bytes, the limit of this server")

    def _bounded(self, receive: Receive) -> Receive:
        """``receive`` with the body's limits of size and time."""
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
                message_text = f"the body did not arrive within {self._body_seconds:.0f} s"
                raise ApiError(BODY_TIMEOUT, message_text) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if size > self._max_body:
                    raise self._too_large()
            return message

        return bounded


def _is_this_machine(host: bytes) -> bool:
    """Whether a ``Host`` header is empty, ``localhost`` or an IP address, which no other site can claim."""
    name = re.sub(r":\d*$", "", host.decode("latin-1").lower())
    if name in ("", "localhost"):
        return True
    address = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (parsed.version == 6) == name.startswith("[")
