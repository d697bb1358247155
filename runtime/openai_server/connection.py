"""A connection whose requests must bring their headers whole, in time and no longer than a client has need of."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HELD = 1 << 16  # bytes
HEADER_SECONDS = 30.0


class Connection(HttpToolsProtocol):
    """uvicorn's, which waits for headers for ever and whose parser holds all of an unfinished header or trailer. This
    one closes, without a word, where that is more than MOST_HELD after a read, or where the headers are not whole
    ``header_seconds`` after the connection was made or the request's first byte came.
    """

    def __init__(self, *args: Any, header_seconds: float = HEADER_SECONDS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_seconds = header_seconds
        self._deadline: asyncio.TimerHandle | None = None
        self._held = 0  # bytes since the parser last gave out what it had

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._held += len(data)
        super().data_received(data)
        if self._held > MOST_HELD:
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._deadline is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        self._end_wait()
        self._held = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._held = 0
        super().on_body(body)

    def _await_headers(self) -> None:
        self._deadline = self.loop.call_later(self._header_seconds, self.transport.close)

    def _end_wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
