"""A client of server-sent events that costs little beside the server: one request a connection, read to its end."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

DONE = "[DONE]"


class Streamed(NamedTuple):
    """``status``: 0 if nothing was answered. ``first``: seconds to the first event that tells text. ``whole``: the
    response came to its own end, not only the connection.
    """

    status: int
    events: list[Any]
    first: float | None
    seconds: float
    whole: bool


async def stream(url: str, body: dict[str, Any], key: str = "", silent_events: int = 0) -> Streamed:
    """POST ``body`` to ``url``. ``silent_events``: events before the first that tells text."""
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
        pass  # what came before is judged below
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
    """What the events hold; a body that is no stream is one."""
    if not text.startswith("data: "):
        return [json.loads(text)] if text.startswith("{") else []
    told = [event.removeprefix("data: ") for event in text.split("\n\n") if event.endswith(("}", "]"))]
    return [event if event == DONE else json.loads(event) for event in told]
