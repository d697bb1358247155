"""What the endpoints share: the engine under its public name, prompts as tokens, whole answers and streams."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from trimode.common.errors import TriModeError
from trimode.runtime.api.llm import LLM, RequestOutput
from trimode.runtime.openai_server import http_errors as errors
from trimode.runtime.openai_server.http_errors import BAD_REQUEST, NO_MODEL, ApiError
from trimode.runtime.openai_server.metrics import ServerMetrics
from trimode.runtime.openai_server.reasoning import CLOSE, OPEN
from trimode.runtime.openai_server.running import ClientLeftError, Run, Running
from trimode.runtime.openai_server.schema import (
    Answer,
    CompletionTokensDetails,
    FinishReason,
    PromptTokensDetails,
    Usage,
)
from trimode.runtime.request.errors import ContextLengthError
from trimode.runtime.request.outputs import CompletionOutput

log = logging.getLogger("trimode.server")

# Text this long is tokenised in a thread of its own, lest every stream wait for it.
LONG_TEXT = 1 << 14
EVENT_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Head(NamedTuple):
    """What all chunks of an answer have in common."""

    id: str
    created: int
    model: str


class Service:
    def __init__(self, llm: LLM, model_name: str, request_seconds: float) -> None:
        self.llm = llm
        self.model_name = model_name
        self.running = Running(llm, request_seconds)
        self.metrics = ServerMetrics(llm)
        self._open, self._close = (llm.tokenizer.token_id(mark) for mark in (OPEN, CLOSE))

    def head(self, kind: str) -> Head:
        return Head(f"{kind}-{uuid.uuid4().hex}", int(time.time()), self.model_name)

    def require_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise ApiError(NO_MODEL, f"this server has no such model; it serves {self.model_name}", "model")

    def require_stream(self, stream: bool | None, options: object) -> None:
        if options is not None and not stream:
            raise ApiError(BAD_REQUEST, "stream_options has a meaning only with stream", "stream_options")

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """add_special_tokens: what the tokenizer adds around plain text; a rendered chat has it already.

        Raises ContextLengthError, at once, for a text that is too long whatever its tokens are."""
        capacity = self.llm.manifest.limits.capacity
        if len(text) > capacity * self.llm.tokenizer.longest_token:
            raise ContextLengthError(
                f"the prompt has {len(text)} characters; the engine's capacity is {capacity} tokens"
            )
        if len(text) < LONG_TEXT:
            return self.llm.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.llm.tokenizer.encode, text, add_special_tokens)

    def room(self, prompt: list[int]) -> int:
        """Tokens that may follow the prompt."""
        capacity = self.llm.manifest.limits.capacity
        if len(prompt) >= capacity:
            raise ContextLengthError(f"the prompt has {len(prompt)} tokens; the engine's capacity is {capacity}")
        return capacity - len(prompt)

    def usage(self, requests: Sequence[RequestOutput], thinking: bool = False) -> Usage:
        """``thinking``: the prompt left a thought open."""
        outputs = [output for request in requests for output in request.outputs]
        prompt = sum(len(request.prompt_token_ids) for request in requests)
        completion = sum(output.length for output in outputs)
        accepted = sum(output.counts.accepted for output in outputs)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(request.outputs[0].counts.cached_tokens for request in requests)
            ),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=sum(self._thought(output.token_ids, thinking) for output in outputs),
                accepted_prediction_tokens=accepted,
                rejected_prediction_tokens=sum(output.counts.drafted for output in outputs) - accepted,
            ),
        )

    def _thought(self, token_ids: list[int], thinking: bool) -> int:
        if not thinking and token_ids[:1] != [self._open]:
            return 0
        return token_ids.index(self._close) if self._close in token_ids else len(token_ids)

    def stream(
        self,
        run: Run,
        first: Iterable[Answer],
        tell: Callable[[int, RequestOutput], Iterable[Answer]],
        last: Callable[[Sequence[RequestOutput]], Iterable[Answer]],
    ) -> Response:
        """Server-sent events: ``first``, what ``tell`` makes of each update of the run's n-th request, ``last``.

        With several requests the later ones run meanwhile, and are told after.
        """

        async def events() -> AsyncIterator[str]:
            try:
                # What comes at once goes at once: a write to the socket costs more than all that makes an event.
                told = "".join(map(_event, first))
                for number, request in enumerate(run.requests):
                    async for _ in request:
                        for output in request.outputs:
                            run.check(output)
                        told += "".join(map(_event, tell(number, request)))
                        if told and not request.finished:
                            yield told
                            told = ""
                    self.metrics.observe(request)
                yield told + "".join(map(_event, last(run.requests))) + "data: [DONE]\n\n"
            except ClientLeftError:
                return
            except Exception as error:
                if not isinstance(error, TriModeError):
                    log.exception("a stream failed")
                yield _event(errors.answer(error))

        return _EventStream(run, events())


class _EventStream(StreamingResponse):
    """The run ends with the response, also where the client has left before its first event."""

    def __init__(self, run: Run, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=EVENT_HEADERS)
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        with self._run:
            await self._run.attended(self.stream_response(send), receive)


def ended(output: CompletionOutput) -> FinishReason | None:
    """None while it runs. An answer that was cut off is an error, which :meth:`Run.check` raised before."""
    return None if output.finish_reason == "cancelled" else output.finish_reason


def _event(record: Answer) -> str:
    return f"data: {record.json_text()}\n\n"


def json_response(record: Answer) -> Response:
    return Response(record.json_text(), media_type="application/json")


def some(**fields: Any) -> dict[str, Any]:
    """The fields that are there; what is not set is not written."""
    return {name: value for name, value in fields.items() if value is not None}
