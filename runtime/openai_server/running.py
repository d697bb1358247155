"""The engine requests of one HTTP request: they are aborted, and their slots freed, however the HTTP request ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from starlette.requests import Request
from starlette.types import Receive

from trimode.common.errors import TriModeError
from trimode.runtime.api.inputs import Input
from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.openai_server.http_errors import BAD_REQUEST, REQUEST_TIMEOUT, ApiError
from trimode.runtime.request.errors import ShutDownError
from trimode.runtime.request.outputs import CompletionOutput
from trimode.runtime.request.sampling_params import SamplingParams


class ClientLeftError(Exception):
    """The client closed the connection."""


class Running:
    """All HTTP requests in progress, so that a server that stops can end them.

    seconds: limit of one request.
    """

    def __init__(self, llm: EngineLLM, seconds: float) -> None:
        self.llm = llm
        self._seconds = seconds
        self._runs: set[Run] = set()

    def start(self, prompts: Sequence[Input], params: Sequence[SamplingParams], streaming: bool) -> Run:
        """One engine request for each prompt, with its parameters. If one is refused, none is started."""
        answers = sum(of_prompt.n for of_prompt in params)
        if answers > self.llm.max_answers:
            limit = f"this server runs or queues at most {self.llm.max_answers} answers"
            raise ApiError(BAD_REQUEST, f"the request needs {answers} answers, but {limit}; send fewer prompts")
        run = Run(self, self._seconds)
        try:
            for prompt, of_prompt in zip(prompts, params, strict=True):
                run.requests.append(self.llm.generate_async(prompt, of_prompt, streaming))
        except BaseException:
            run.end()
            raise
        self._runs.add(run)
        return run

    def forget(self, run: Run) -> None:
        self._runs.discard(run)

    def cancel_all(self) -> None:
        for run in list(self._runs):
            run.cancel(ShutDownError("the server is shutting down; the response is incomplete"))


class Run:
    """``with run:`` around all use of ``requests``."""

    def __init__(self, running: Running, seconds: float) -> None:
        self.requests: list[RequestOutput] = []
        self._running = running
        self._reason: Exception | None = None
        message = f"the response took longer than {seconds:.0f} s, the limit of this server; request fewer tokens"
        timeout = ApiError(REQUEST_TIMEOUT, message)
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
        """Raises the reason if the output was cancelled."""
        if output.finish_reason == "cancelled":
            raise self._reason or TriModeError("the request was cancelled")

    async def attended(self, answering: Awaitable[None], receive: Receive) -> None:
        """Await ``answering``. If the client leaves, cancel the requests; ``check`` then raises ClientLeftError.

        The body has been read, so the next message of ``receive`` is the disconnection.
        """
        left = asyncio.ensure_future(_left(receive))
        left.add_done_callback(lambda task: None if task.cancelled() else self.cancel(ClientLeftError()))
        try:
            await answering
        finally:
            left.cancel()

    async def finish(self, http: Request) -> None:
        """Wait for every request. Raises ClientLeftError if the client leaves first."""
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
