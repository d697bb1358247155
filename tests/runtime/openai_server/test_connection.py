"""Headers that are too late or too long close their connection; those of ordinary clients do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from scripts.serving.server_process import Served
from tests.support.patience import HANG_SECONDS
from trimode.runtime.openai_server.connection import MOST_HELD, Connection

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
LONG = b"a: " + b"x" * 40_000 + b"\r\n"
TOO_LONG = b"a: " + b"x" * (1 << 20)
HEADER_SECONDS = 0.5

Connected = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(_: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body in bytes."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message["more_body"]
    text = b"%d" % size
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


@asynccontextmanager
async def connected(header_seconds: float) -> AsyncIterator[Connected]:
    config = uvicorn.Config(app, lifespan="off")
    make = partial(Connection, config=config, server_state=ServerState(), app_state={}, header_seconds=header_seconds)
    async with await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        yield reader, writer
        writer.close()


async def answer(connection: Connected, *parts: bytes) -> bytes:
    """Send a request in these parts. Returns the body of the response, empty if the connection was closed."""
    reader, writer = connection
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        async with asyncio.timeout(HANG_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            return await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


def test_an_ordinary_client() -> None:
    """Long headers, a long body in the same write, and a pause between two requests."""

    async def talk() -> None:
        async with connected(HEADER_SECONDS) as connection:
            assert await answer(connection, GET + LONG + b"\r\n") == b"0"
            await asyncio.sleep(2 * HEADER_SECONDS)
            size = 3 * MOST_HELD
            assert await answer(connection, POST + b"content-length: %d\r\n\r\n" % size + b"x" * size) == b"%d" % size
            await asyncio.sleep(2 * HEADER_SECONDS)
            assert await answer(connection, GET + b"\r\n") == b"0"

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("header_seconds", "parts"),
    [
        pytest.param(HEADER_SECONDS, [GET, b"a: b"], id="in time"),
        pytest.param(3600, [GET, TOO_LONG], id="in length"),
        pytest.param(3600, [GET, *[LONG] * 8], id="in number"),
        pytest.param(3600, [POST, b"transfer-encoding: chunked\r\n\r\n0\r\n", TOO_LONG], id="a trailer in length"),
    ],
)
@pytest.mark.parametrize("earlier", [0, 1])
def test_headers_that_do_not_end(header_seconds: float, parts: list[bytes], earlier: int) -> None:
    """On a connection's first request, and on a later one."""

    async def talk() -> None:
        async with connected(header_seconds) as connection:
            for _ in range(earlier):
                assert await answer(connection, GET + b"\r\n") == b"0"
            assert await answer(connection, *parts) == b""

    asyncio.run(talk())


def test_a_connection_without_a_request() -> None:
    async def talk() -> None:
        async with connected(HEADER_SECONDS) as connection:
            assert await answer(connection) == b""

    asyncio.run(talk())


def test_the_server_uses_this_connection(served: Served) -> None:
    async def talk() -> bytes:
        host, _, port = served.url.removeprefix("http://").rpartition(":")
        return await answer(await asyncio.open_connection(host, int(port)), GET, TOO_LONG)

    assert asyncio.run(talk()) == b""
