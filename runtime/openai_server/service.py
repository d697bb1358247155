"""What the endpoints share: the engine under its served names, prompts as tokens, limits, usage, and streams."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from fastapi.responses import Response

from trimode.common.errors import TriModeError
from trimode.runtime.api.engine_metrics import EngineMetrics
from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.openai_server import http_errors
from trimode.runtime.openai_server.event_stream import DONE, EventStream, event
from trimode.runtime.openai_server.http_errors import BAD_REQUEST, TOO_LONG, ApiError, context_limit
from trimode.runtime.openai_server.model_names import ModelName, ModelNames
from trimode.runtime.openai_server.output_formats import OutputFormat
from trimode.runtime.openai_server.reasoning import CLOSE, OPEN
from trimode.runtime.openai_server.request_bodies import NO_LIMIT, Body, DecodingBody, PromptBody, take_ignored_fields
from trimode.runtime.openai_server.response_bodies import (
    CompletionTokensDetails,
    FinishReason,
    PromptTokensDetails,
    ResponseBody,
    Usage,
)
from trimode.runtime.openai_server.running import ClientLeftError, Run, Running
from trimode.runtime.openai_server.tools.call_syntax import CallSyntax
from trimode.runtime.openai_server.tools.syntaxes import SYNTAXES, syntax_of_template
from trimode.runtime.request.errors import GrammarError
from trimode.runtime.request.outputs import CompletionOutput
from trimode.runtime.request.sampling_params import SamplingParams

log = logging.getLogger("trimode.server")

# Text of this many characters is tokenised in a thread, so that streams do not wait for it.
LONG_TEXT = 1 << 14
IGNORED_FIELDS_HEADER = "x-trimode-ignored-fields"


Record = TypeVar("Record", bound=ResponseBody)


class ResponseHead(NamedTuple):
    """The fields that all chunks of a response have in common."""

    id: str
    created: int
    model: str


class Service:
    """model_names: one name or several, the default first. strict_fields: refuse unknown fields. tool_call_parser: how
    the model writes calls, a name of ``SYNTAXES``; by default as its chat template shows.
    """

    def __init__(
        self,
        llm: EngineLLM,
        model_names: str | Sequence[str],
        request_seconds: float,
        *,
        strict_fields: bool = False,
        tool_call_parser: str | None = None,
    ) -> None:
        self.llm = llm
        syntax = tool_call_parser or syntax_of_template(llm.tokenizer.tool_template)
        self.call_syntax: CallSyntax = SYNTAXES[syntax](llm.tokenizer.special_tokens)
        self.names = ModelNames([model_names] if isinstance(model_names, str) else model_names)
        self.running = Running(llm, request_seconds)
        self.metrics = EngineMetrics(llm)
        self._strict_fields = strict_fields
        # Threads of their own: many large grammars must not delay what else runs in threads.
        self._compiling = ThreadPoolExecutor(2, "trimode-grammars")
        self._open, self._close = (llm.tokenizer.token_id(mark) for mark in (OPEN, CLOSE))

    @property
    def context_length(self) -> int:
        """Tokens of prompt and completion together."""
        return self.llm.capacity.context

    def head(self, kind: str, model: ModelName) -> ResponseHead:
        return ResponseHead(f"{kind}-{uuid.uuid4().hex}", int(time.time()), model.name)

    def report_ignored_fields(self, body: Body, http: Request) -> dict[str, str]:
        """Log the unknown fields of ``body`` in one line and return them as a response header.

        With ``strict_fields`` raises ApiError instead.
        """
        ignored = take_ignored_fields(body)
        if not ignored:
            return {}
        listed = ", ".join(ignored)
        if self._strict_fields:
            raise ApiError(BAD_REQUEST, f"unknown fields: {listed}; this server runs with --strict-fields", ignored[0])
        log.warning("request %s: ignored unknown fields: %s", http.scope.get("trimode.request_id", "-"), listed)
        return {IGNORED_FIELDS_HEADER: listed}

    def sampling_params(
        self, body: DecodingBody, model: ModelName, form: OutputFormat | None, *, max_tokens: int, **resolved: Any
    ) -> SamplingParams:
        """The body's parameters, with the alias's mode. form: of the response; None for free text."""
        if body.mode and model.mode and body.mode != model.mode:
            raise ApiError(BAD_REQUEST, f"mode is {body.mode}, but the model {model.name} selects {model.mode}", "mode")
        if (body.min_tokens or 0) > max_tokens:
            raise ApiError(BAD_REQUEST, f"min_tokens is {body.min_tokens}, more than max_tokens", "min_tokens")
        # The engine returns its top k logits; a larger top_k draws from all of them, as 0 and -1 do.
        top_k = body.top_k
        if top_k is not None and not 0 <= top_k <= self.llm.manifest.limits.top_k:
            top_k = 0
        mode = body.mode or model.mode
        if form is not None:
            if (mode or self.llm.capacity.defaults.mode) == "diffusion":
                reason = "it needs mode linear_spec, auto or ar; diffusion chooses the tokens of a block together"
                raise ApiError(BAD_REQUEST, f"{form.field}: {reason}", form.field)
            resolved["guided_decoding"] = form.guided
        return body.sampling_params(max_tokens=max_tokens, mode=mode, top_k=top_k, **resolved)

    async def compile_grammar(self, requested: OutputFormat | None) -> None:
        """Compile a format in a thread, so that streams do not wait for it. Raises ApiError with its field."""
        if requested is None:
            return
        await asyncio.get_running_loop().run_in_executor(self._compiling, self._compile, requested)

    def _compile(self, requested: OutputFormat) -> None:
        try:
            self.llm.compile_grammar(requested.guided)
        except GrammarError as error:
            for name, part in requested.parts:
                try:
                    self.llm.compile_grammar(part)
                except GrammarError as found:
                    raise _refusal(requested.field, f"{name}: ", found) from None
            raise _refusal(requested.field, "", error) from None

    async def encode(self, text: str, body: PromptBody, add_special_tokens: bool) -> list[int]:
        """``add_special_tokens``: those that the tokenizer adds around plain text; a rendered chat has them already.

        Raises ApiError, without tokenising, for a text that is too long whatever its tokens are."""
        if len(text) > self.context_length * self.llm.tokenizer.longest_token:
            raise self._too_long(f"the prompt has {len(text)} characters, which are more tokens than that", body)
        if len(text) < LONG_TEXT:
            return self.llm.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.llm.tokenizer.encode, text, add_special_tokens)

    def completion_length(
        self, prompt: list[int], body: PromptBody, requested: int | None, default: int | None = None
    ) -> int:
        """Tokens of the completion: as ``requested``, or else the default, or without one as many as memory allows.

        -1 requests as many as memory allows. A default is cut to what fits. Raises ApiError if prompt and completion do
        not fit.
        """
        room = self.context_length - len(prompt)
        if room <= 0:
            raise self._too_long(
                f"your {body.prompt_field} resulted in {len(prompt)} tokens. Please reduce the length of the "
                f"{body.prompt_field}",
                body,
            )
        if requested == NO_LIMIT or (requested is None and default is None):
            return self.llm.capacity.default_max_tokens(len(prompt))
        if requested is None:
            return min(default or room, room)
        if requested < 1:
            raise ApiError(BAD_REQUEST, f"max_tokens is {requested}; it must be at least 1", "max_tokens")
        if requested > room:
            raise self._too_long(
                f"you requested {len(prompt) + requested} tokens ({len(prompt)} in the {body.prompt_field}, "
                f"{requested} in the completion). Please reduce the length of the {body.prompt_field} or completion; "
                f"at most {room} tokens fit the completion",
                body,
            )
        return requested

    def _too_long(self, reason: str, body: PromptBody) -> ApiError:
        return ApiError(TOO_LONG, f"{context_limit(self.context_length)}. However, {reason}.", body.prompt_field)

    def usage(self, requests: Sequence[RequestOutput], thinking: bool = False) -> Usage:
        """``thinking``: the prompt ends inside a thought."""
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
                reasoning_tokens=sum(self._reasoning_tokens(output.token_ids, thinking) for output in outputs),
                accepted_prediction_tokens=accepted,
                rejected_prediction_tokens=sum(output.counts.drafted for output in outputs) - accepted,
            ),
        )

    def _reasoning_tokens(self, token_ids: list[int], thinking: bool) -> int:
        if not thinking and token_ids[:1] != [self._open]:
            return 0
        return token_ids.index(self._close) if self._close in token_ids else len(token_ids)

    def stream(
        self,
        run: Run,
        first: Iterable[Record],
        chunks: Callable[[int, RequestOutput], Iterable[Record]],
        last: Callable[[Sequence[RequestOutput]], Iterable[Record]],
        *,
        write: Callable[[Record], str] = event,
        failure: Callable[[Exception], Record] | None = None,
        end: str = DONE,
    ) -> Response:
        """Server-sent events: ``first``, the ``chunks`` of each update of the run's n-th request, ``last``, ``end``.

        Several requests run at the same time; the stream has them one after the other. ``failure``: the event of an
        error, which ends the stream; by default the error's body.
        """

        async def events() -> AsyncIterator[str]:
            try:
                # Events that arrive together are sent together: a write to the socket costs more than an event.
                pending = "".join(map(write, first))
                for number, request in enumerate(run.requests):
                    async for _ in request:
                        for output in request.outputs:
                            run.check(output)
                        pending += "".join(map(write, chunks(number, request)))
                        if pending and not request.finished:
                            yield pending
                            pending = ""
                    self.metrics.observe(request)
                yield pending + "".join(map(write, last(run.requests))) + end
            except ClientLeftError:
                return
            except Exception as error:
                if not isinstance(error, TriModeError):
                    log.exception("a stream failed")
                yield event(http_errors.error_body(error)) if failure is None else write(failure(error))

        return EventStream(run, events())


def _refusal(field: str, part: str, error: GrammarError) -> ApiError:
    return ApiError(BAD_REQUEST, f"{field}: {part}{str(error).removeprefix('guided_decoding: ')}", field)


def finish_reason(output: CompletionOutput) -> FinishReason | None:
    """None while it runs; for a cancelled output, :meth:`Run.check` has raised before."""
    return None if output.finish_reason == "cancelled" else output.finish_reason


def json_response(record: ResponseBody, headers: dict[str, str] | None = None) -> Response:
    return Response(record.json_text(), media_type="application/json", headers=headers)


def without_none(**fields: Any) -> dict[str, Any]:
    """The fields that have a value; others are not written."""
    return {name: value for name, value in fields.items() if value is not None}
