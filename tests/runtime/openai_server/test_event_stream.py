"""A stream that waits sends comments; a stream that sends events does not, and nothing follows its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Self

from tests.support.patience import HANG_SECONDS
from trimode.runtime.openai_server.event_stream import COMMENT, COMMENT_SECONDS, EventStream


class NoRun:
    """Stands for a run that no client leaves."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    async def attended(self, answering: Awaitable[None], _: Any) -> None:
        await answering


async def sent(
    events: AsyncIterator[str], comment_seconds: float, released: asyncio.Event, after: float = 0
) -> list[bytes]:
    """The messages of a whole response, and of so many seconds ``after`` it. The third comment sets ``released``."""
    bodies: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])
            if bodies == [COMMENT] * 3:
                released.set()

    await EventStream(NoRun(), events, comment_seconds)({}, None, send)  # type: ignore[arg-type]
    await asyncio.sleep(after)
    return bodies


def test_comments_while_waiting() -> None:
    released = asyncio.Event()

    async def events() -> AsyncIterator[str]:
        await released.wait()
        yield "data: a\n\n"
        yield "data: b\n\n"

    async def run() -> list[bytes]:
        return await sent(events(), 0.02, released, after=0.06)

    bodies = asyncio.run(run())
    first = bodies.index(b"data: a\n\n")
    assert first >= 3
    assert bodies[:first] == [COMMENT] * first
    assert bodies[first:] == [b"data: a\n\n", b"data: b\n\n", b""]


def test_no_comments_between_events() -> None:
    async def events() -> AsyncIterator[str]:
        for _ in range(5):
            await asyncio.sleep(0.01)
            yield "data: a\n\n"

    assert COMMENT not in asyncio.run(sent(events(), HANG_SECONDS, asyncio.Event()))


def test_clients_skip_a_comment() -> None:
    """It is a line that begins with a colon, and an event ends with an empty line."""
    assert COMMENT_SECONDS < 10
    assert COMMENT.startswith(b":")
    assert COMMENT.endswith(b"\n\n")
