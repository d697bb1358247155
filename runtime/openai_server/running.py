"""One HTTP request's share of the engine: its requests are aborted, and their slots free, when it ends in any way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from starlette.requests import Request
from starlette.types import Receive

from trimode.common.errors import TriModeError
from trimode.runtime.api.llm import LLM, Input, RequestOutput
from trimode.runtime.openai_server.http_errors import REQUEST_TIMEOUT, ApiError
from trimode.runtime.request.errors import ShutDownError
from trimode.runtime.request.outputs import CompletionOutput
from trimode.runtime.request.sampling_params import SamplingParams


class ClientLeftError(Exception):
    """There is nobody to answer."""


class Running:
    """The HTTP requests that the engine works on, so that all can be ended when the server must."""

    def __init__(self, llm: LLM, seconds: float) -> None:
        self.llm = llm
        self._seconds = seconds
        self._runs: set[Run] = set()

    def start(self, prompts: Sequence[Input], params: SamplingParams, streaming: bool) -> Run:
        """One request of the engine for each prompt, or none: raises what the first refused one raises."""
        run = Run(self, self._seconds)
        try:
            for prompt in prompts:
                run.requests.append(self.llm.generate_async(prompt, params, streaming))
        except BaseException:
            run.end()
            raise
        self._runs.add(run)
        return run

    def forget(self, run: Run) -> None:
        self._runs.discard(run)

    def cancel_all(self) -> None:
        for run in list(self._runs):
            run.cancel(ShutDownError("the server is shutting down; the answer is not whole"))


class Run:
    """``with run:`` around all use of its requests."""

    def __init__(self, running: Running, seconds: float) -> None:
        self.requests: list[RequestOutput] = []
        self._running = running
        self._reason: Exception | None = None
        timeout = ApiError(REQUEST_TIMEOUT, f"the answer took longer than {seconds:.0f} s, the limit of this server")
        self._timer = asyncio.get_running_loop().call_later(seconds, self.cancel, timeout)

    def cancel(self, reason: Exception) -> None:
        self._reason = reason
        for request in self.requests:
            request.abort()

    def end(self) -> None:
        self._timer.cancel()
        self._running.forget(self)
        for request in self.requests:
            if not request.finished:
                request.abort()

    def check(self, output: CompletionOutput) -> None:
        """Raises the reason if the answer was cut off."""
        if output.finish_reason == "cancelled":
            raise self._reason or TriModeError("the answer was cancelled")

    async def attended(self, answering: Awaitable[None], receive: Receive) -> None:
        """Await what answers the client, as long as the client is there: if it leaves, the requests are cancelled and
        ``check`` raises ClientLeftError. The body is read already, so the next message says that it has left.
        """
        left = asyncio.ensure_future(_left(receive))
        left.add_done_callback(lambda task: None if task.cancelled() else self.cancel(ClientLeftError()))
        try:
            await answering
        finally:
            left.cancel()

    async def finish(self, http: Request) -> None:
        """Wait for every answer. Raises ClientLeftError if the client goes first."""
        await self.attended(self._finished(), http.receive)
        for request in self.requests:
            for output in request.outputs:
                self.check(output)

    async def _finished(self) -> None:
        for request in self.requests:
            await request

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
