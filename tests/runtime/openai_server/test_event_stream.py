"""A stream that waits sends comments; a stream that sends events does not, and nothing follows its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Self

from trimode.runtime.openai_server.event_stream import COMMENT, COMMENT_SECONDS, EventStream


class NoRun:
    """Stands for a run that no client leaves."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    async def attended(self, answering: Awaitable[None], _: Any) -> None:
        await answering


async def sent(events: AsyncIterator[str], comment_seconds: float) -> list[bytes]:
    """The messages of a whole response, and of a moment after it."""
    bodies: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])

    await EventStream(NoRun(), events, comment_seconds)({}, None, send)  # type: ignore[arg-type]
    await asyncio.sleep(3 * comment_seconds)
    return bodies


def test_comments_while_waiting() -> None:
    released = asyncio.Event()

    async def events() -> AsyncIterator[str]:
        await released.wait()
        yield "data: a\n\n"
        yield "data: b\n\n"

    async def run() -> list[bytes]:
        asyncio.get_running_loop().call_later(0.2, released.set)
        return await sent(events(), 0.02)

    bodies = asyncio.run(run())
    first = bodies.index(b"data: a\n\n")
    assert first >= 1
    assert bodies[:first] == [COMMENT] * first
    assert bodies[first:] == [b"data: a\n\n", b"data: b\n\n", b""]


def test_no_comments_between_events() -> None:
    async def events() -> AsyncIterator[str]:
        for _ in range(5):
            await asyncio.sleep(0.01)
            yield "data: a\n\n"

    assert COMMENT not in asyncio.run(sent(events(), 1.0))


def test_clients_skip_a_comment() -> None:
    """It is a line that begins with a colon, and an event ends with an empty line."""
    assert COMMENT_SECONDS < 10
    assert COMMENT.startswith(b":")
    assert COMMENT.endswith(b"\n\n")
