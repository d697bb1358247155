"""A client of server-sent events that needs little processor time: one request per connection, read to its end."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

DONE = "[DONE]"


class Streamed(NamedTuple):
    """``status``: 0 without a response. ``first``: seconds to the first event with text. ``whole``: the response is
    complete; the connection did not break.
    """

    status: int
    events: list[Any]
    first: float | None
    seconds: float
    whole: bool


async def stream(url: str, body: dict[str, Any], key: str = "", silent_events: int = 0) -> Streamed:
    """POST ``body`` to ``url``. ``silent_events``: events before the first one with text."""
    begun, first, received = time.perf_counter(), None, bytearray()
    try:
        reader, writer = await asyncio.open_connection(*_address(url))
    except OSError:
        return Streamed(0, [], None, time.perf_counter() - begun, False)
    try:
        writer.write(event_request(url, body, key))
        while data := await reader.read(1 << 16):
            received += data
            if first is None and received.count(b"data: ") > silent_events:
                first = time.perf_counter() - begun
    except OSError:
        pass  # what arrived is returned below
    finally:
        writer.close()
    status, text, whole = _parse(bytes(received))
    return Streamed(status, _events(text), first, time.perf_counter() - begun, whole)


def event_request(url: str, body: dict[str, Any], key: str) -> bytes:
    """The whole request; the server closes the connection after its answer."""
    parts, payload = urlsplit(url), json.dumps(body).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


def _address(url: str) -> tuple[str | None, int | None]:
    parts = urlsplit(url)
    return parts.hostname, parts.port


def _parse(received: bytes) -> tuple[int, str, bool]:
    """Status, body, and whether the body is whole."""
    head, found, rest = received.partition(b"\r\n\r\n")
    if not found:
        return 0, "", False
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" not in head.lower():
        return status, rest.decode(), True
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return status, body.decode(), True
        body += rest[:length]
        rest = rest[length + 2 :]
    return status, body.decode(errors="replace"), False


def _events(text: str) -> list[Any]:
    """The data of the events, without comments; a body that is not a stream counts as one event."""
    if text.startswith("{"):
        return [json.loads(text)]
    data = [event[len("data: ") :] for event in text.split("\n\n") if event.startswith("data: ")]
    return [event if event == DONE else json.loads(event) for event in data if event.endswith(("}", "]"))]
