"""Server-sent events, with comments while nothing else is sent, so that proxies keep the connection open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from trimode.runtime.openai_server.response_bodies import ResponseBody
from trimode.runtime.openai_server.running import Run

EVENT_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
# Proxies close a connection that is silent for 30 to 60 s. Clients skip a comment, a line that begins with a colon.
COMMENT_SECONDS = 5.0
COMMENT = b": waiting\n\n"
DONE = "data: [DONE]\n\n"


def event(record: ResponseBody) -> str:
    return f"data: {record.json_text()}\n\n"


class EventStream(StreamingResponse):
    """``run`` ends with the response, even if the client leaves before the first event."""

    def __init__(self, run: Run, events: AsyncIterator[str], comment_seconds: float = COMMENT_SECONDS) -> None:
        super().__init__(events, media_type="text/event-stream", headers=EVENT_HEADERS)
        self._run = run
        self._comment_seconds = comment_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        with self._run:
            sender = _CommentingSender(send, self._comment_seconds)
            try:
                await self._run.attended(self.stream_response(sender.send), receive)
            finally:
                sender.stop()


class _CommentingSender:
    """``send`` with a comment after every ``seconds`` without a message, from the first to the last message."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._task: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        self._last = self._loop.time()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.stop()
        await self._send(message)
        if message["type"] == "http.response.start":
            self._task = asyncio.create_task(self._comment())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _comment(self) -> None:
        with suppress(OSError):  # the client has left; the response ends by itself
            while True:
                silent = self._loop.time() - self._last
                if silent < self._seconds:
                    await asyncio.sleep(self._seconds - silent)
                    continue
                self._last = self._loop.time()
                await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
