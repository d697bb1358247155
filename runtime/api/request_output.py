"""What ``LLM.generate`` and ``LLM.generate_async`` return: a prompt's answers, complete or in progress."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any, Self

from trimode.runtime.request.errors import ForkedError
from trimode.runtime.request.outputs import CompletionOutput, PromptLogprobs, Update
from trimode.runtime.scheduling.running_request import Request


class Mailbox:
    """Updates on their way from the scheduler's thread to a reader in another thread or in an event loop.

    The scheduler holds the mailbox, not the RequestOutput, so that an output without references is collected.
    """

    def __init__(self) -> None:
        self.updates: deque[Update] = deque()
        self.error: Exception | None = None
        self.process = os.getpid()
        self._arrived = threading.Condition()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
            self._signal: asyncio.Event | None = asyncio.Event()
        except RuntimeError:
            self._loop = self._signal = None

    @property
    def filled(self) -> bool:
        return bool(self.updates) or self.error is not None

    def put(self, update: Update) -> None:
        """Called on the scheduler's thread."""
        with self._arrived:
            self.updates.append(update)
            self._arrived.notify()
        if self._loop is not None and self._signal is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._signal.set)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is filled; returns False after ``timeout`` seconds."""
        self.require_process()
        with self._arrived:
            return self._arrived.wait_for(lambda: self.filled, timeout)

    async def wait_async(self) -> None:
        self.require_process()
        if self._signal is None or self._loop is not asyncio.get_running_loop():
            raise RuntimeError("await a RequestOutput in the event loop in which it was made, or call result()")
        while not self.filled:
            self._signal.clear()
            if not self.filled:
                await self._signal.wait()

    def require_process(self) -> None:
        """After a fork no update arrives in the child."""
        if os.getpid() != self.process:
            raise ForkedError(
                f"this request was made in process {self.process}, before a fork; load the engine in this process and "
                "ask again"
            )


class RequestOutput:
    """A prompt's answers. ``await`` it or call :meth:`result` for the whole; iterate it, with ``async for`` or ``for``,
    for each update.

    prompt: the text, None if token ids were given. prompt_logprobs: of the prompt's tokens, as soon as they are known;
    None if they were not requested. outputs: ``n`` answers, as of the latest update taken; their
    ``*_diff`` fields hold what that update added.

    The request ends early, and its slot is free within one scheduler step, when the caller calls :meth:`abort`, when an
    ``await`` is cancelled (``asyncio.wait_for`` included), when a loop over it is left, and when no reference to it is
    left. For use by one caller at a time, in any thread.
    """

    def __init__(self, request_id: int, prompt: str | None, prompt_token_ids: list[int], answers: int) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.prompt_logprobs: PromptLogprobs | None = None
        self.outputs = [CompletionOutput(index) for index in range(answers)]
        self._requests: list[Request] = []
        self._llm: object = None  # keeps the engine loaded
        self._mailbox = Mailbox()

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    def abort(self) -> None:
        """End the request. Its slot is free within one step; its answers' finish_reason is ``cancelled``."""
        for request in self._requests:
            request.aborted = True

    def result(self, timeout: float | None = None) -> Self:
        """Wait until it is finished. Raises TimeoutError after ``timeout`` seconds, without ending the request, or the
        error that ended the request.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.finished:
            left = None if deadline is None else deadline - time.monotonic()
            if not self._mailbox.wait(left):
                raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
            self._take_all()
        return self

    def __iter__(self) -> Iterator[Self]:
        try:
            while not self.finished:
                self._mailbox.wait()
                self._take_all()
                yield self
        finally:
            self._abort_unfinished()

    def __await__(self) -> Generator[Any, None, Self]:
        return self._finish().__await__()

    async def __aiter__(self) -> AsyncIterator[Self]:
        try:
            while not self.finished:
                await self._mailbox.wait_async()
                self._take_all()
                yield self
        finally:
            self._abort_unfinished()

    def __del__(self) -> None:
        self._abort_unfinished()

    async def _finish(self) -> Self:
        try:
            while not self.finished:
                await self._mailbox.wait_async()
                self._take_all()
        finally:
            self._abort_unfinished()
        return self

    def _abort_unfinished(self) -> None:
        """Without effect on requests that are finished: the scheduler has forgotten them."""
        if not self.finished:
            self.abort()

    def _take_all(self) -> None:
        """Take all updates that have arrived, as one. Raises the request's error, also on later calls."""
        for output in self.outputs:
            output.begin_update()
        mailbox = self._mailbox
        while mailbox.updates:
            update = mailbox.updates.popleft()
            if update.prompt_logprobs is not None:
                self.prompt_logprobs = update.prompt_logprobs
            if update.error is None:
                self.outputs[update.index].apply(update)
            else:
                mailbox.error = update.error
        if mailbox.error is not None:
            self.abort()  # the other answers
            raise mailbox.error
