"""One HTTP connection: uvicorn's, with limits on headers, without upgrades, and with HTTP/1.0 framing."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_HELD = 1 << 16  # bytes
HEADER_SECONDS = 30.0
FRAMING = (b"content-length", b"transfer-encoding")


class Connection(HttpToolsProtocol):
    """uvicorn's protocol has no limit on headers: it waits for them for ever, and its parser keeps all of an unfinished
    one. This class closes the connection if the parser keeps more than MOST_HELD bytes after a read, or if the headers
    are not complete ``header_seconds`` after the connection was made or the request began.

    An ``Upgrade`` header is ignored, as HTTP allows: the request is answered by HTTP/1.1.
    """

    def __init__(self, *args: Any, header_seconds: float = HEADER_SECONDS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_seconds = header_seconds
        self._deadline: asyncio.TimerHandle | None = None
        self._held = 0  # bytes since the parser last delivered something
        self._upgrading = False  # the parser has found an upgrade and skipped the body
        self._resuming = False  # the parser reads the substitute for headers that were delivered before

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._held += len(data)
        try:
            self._unset_keepalive_if_required()
            self._feed(data)
        except httptools.HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)
        if self._held > MOST_HELD:
            self.transport.close()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._resume_without_upgrade()
            self._feed(data[upgrade.args[0] :])

    def _resume_without_upgrade(self) -> None:
        """The parser skips the body of a request with ``Upgrade``. Read the body by a new parser, which gets the lines
        that say how long it is.
        """
        lines = [b"POST / HTTP/1.1", *(b"%s: %s" % header for header in self.headers if header[0] in FRAMING)]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._upgrading, self._resuming = False, True
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))
        self._resuming = False

    def on_message_begin(self) -> None:
        if self._resuming:
            return
        super().on_message_begin()
        if self._deadline is None:
            self._await_headers()

    def on_url(self, url: bytes) -> None:
        if not self._resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._resuming:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._resuming:
            return
        self._upgrading = self.parser.should_upgrade()
        self._end_wait()
        self._held = 0
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            # The cycle's task has not begun, so it will use the subclass from its start.
            self.cycle.__class__ = _Http10Cycle

    def on_body(self, body: bytes) -> None:
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._upgrading:
            super().on_message_complete()

    def _await_headers(self) -> None:
        self._deadline = self.loop.call_later(self._header_seconds, self.transport.close)

    def _end_wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Http10Cycle(RequestResponseCycle):
    """HTTP/1.0 has no chunks: a body of unknown length ends where the connection ends."""

    sized = False

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            sized = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            self.chunked_encoding = None if sized else False
            self.sized = sized
        elif message["type"] == "http.response.body" and not self.sized:
            self.expected_content_length = len(message.get("body", b""))  # for uvicorn's check of the length
        await super().send(message)
