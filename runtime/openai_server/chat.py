"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastapi import Request
from fastapi.responses import Response

from trimode.runtime.api.llm import RequestOutput
from trimode.runtime.openai_server.http_errors import BAD_REQUEST, ApiError
from trimode.runtime.openai_server.reasoning import ReasoningSplitter, Split
from trimode.runtime.openai_server.schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprobs,
    Delta,
    TokenOrigins,
)
from trimode.runtime.openai_server.service import Head, Service, ended, json_response, some
from trimode.runtime.openai_server.tokens import LikelihoodsTeller, OriginsTeller
from trimode.runtime.request.outputs import CompletionOutput, Logprob


async def complete_chat(service: Service, body: ChatCompletionRequest, http: Request) -> Response:
    service.require_model(body.model)
    service.require_stream(body.stream, body.stream_options)
    text, thinking = service.llm.tokenizer.chat_prompt(
        [message.turn() for message in body.messages], enable_thinking=body.enable_thinking
    )
    prompt = await service.encode(text, add_special_tokens=False)
    params = body.sampling_params(max_tokens=_max_tokens(body) or service.room(prompt), logprobs=_logprobs(body))
    head = service.head("chatcmpl")
    inputs = {"prompt_token_ids": prompt, "thinking": thinking}
    run = service.running.start([inputs], params, streaming=bool(body.stream))
    tellers = [_Teller(service, body, thinking) for _ in range(params.n)]
    if body.stream:
        chunks = _Chunks(service, head, body, tellers, thinking)
        return service.stream(run, chunks.first(), chunks.tell, chunks.last)
    with run:
        await run.finish(http)
        (request,) = run.requests
        service.metrics.observe(request)
        return json_response(
            ChatCompletion(
                id=head.id,
                object="chat.completion",
                created=head.created,
                model=head.model,
                choices=[teller.whole(output) for teller, output in zip(tellers, request.outputs, strict=True)],
                usage=service.usage(run.requests, thinking),
            )
        )


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    """The older name stands for the newer one."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(BAD_REQUEST, "max_tokens is another than max_completion_tokens; give one of them", "max_tokens")
    return new or old


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise ApiError(BAD_REQUEST, "top_logprobs has a meaning only with logprobs", "top_logprobs")
    return None


class _Teller:
    """One choice: its thinking set apart, whole or as it comes."""

    def __init__(self, service: Service, body: ChatCompletionRequest, thinking: bool) -> None:
        tokenizer, top = service.llm.tokenizer, _logprobs(body)
        skip = body.skip_special_tokens is not False
        self._likelihoods = None if top is None else LikelihoodsTeller(tokenizer, top, thinking, skip)
        self._splitter = ReasoningSplitter(thinking)
        self._origins = OriginsTeller(tokenizer) if body.return_token_origins else None
        self._told = 0  # tokens
        self._finished = False

    def whole(self, output: CompletionOutput) -> ChatChoice:
        split = _joined(self._splitter.feed(output.text), self._splitter.finish())
        return ChatChoice(
            index=output.index,
            message=AssistantMessage(
                role="assistant", content=split.content, **some(reasoning_content=split.reasoning or None)
            ),
            finish_reason=ended(output),
            **some(
                logprobs=self._tell_likelihoods(output.logprobs or (), split.content),
                trimode=self._tell(output.token_ids, output),
            ),
        )

    def update(self, output: CompletionOutput) -> ChatChunkChoice | None:
        """What the latest update brought; None if it was another answer's."""
        if self._finished or not (output.length > self._told or output.finish_reason):
            return None
        self._told = output.length
        split = self._splitter.feed(output.text_diff)
        if output.finish_reason is not None:
            self._finished = True
            split = _joined(split, self._splitter.finish())
        return ChatChunkChoice(
            index=output.index,
            delta=Delta(**some(reasoning_content=split.reasoning or None, content=split.content or None)),
            finish_reason=ended(output),
            **some(
                logprobs=self._tell_likelihoods(output.logprobs_diff, split.content),
                trimode=self._tell(output.token_ids_diff, output),
            ),
        )

    def _tell_likelihoods(self, rows: Sequence[dict[int, Logprob]], content: str) -> ChatLogprobs | None:
        return None if self._likelihoods is None else self._likelihoods.tell(rows, content)

    def _tell(self, token_ids: list[int], output: CompletionOutput) -> TokenOrigins | None:
        return None if self._origins is None else self._origins.tell(token_ids, output)


def _joined(first: Split, second: Split) -> Split:
    return Split(first.reasoning + second.reasoning, first.content + second.content)


class _Chunks:
    def __init__(
        self, service: Service, head: Head, body: ChatCompletionRequest, tellers: Sequence[_Teller], thinking: bool
    ) -> None:
        self._service = service
        self._head = head
        self._body = body
        self._tellers = tellers
        self._thinking = thinking

    def first(self) -> Iterator[ChatCompletionChunk]:
        for index in range(len(self._tellers)):
            yield self._chunk(
                ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""), finish_reason=None)
            )

    def tell(self, _: int, request: RequestOutput) -> Iterator[ChatCompletionChunk]:
        for teller, output in zip(self._tellers, request.outputs, strict=True):
            if choice := teller.update(output):
                yield self._chunk(choice)

    def last(self, requests: Sequence[RequestOutput]) -> Iterator[ChatCompletionChunk]:
        if self._body.include_usage:
            chunk = self._chunk()
            chunk.usage = self._service.usage(requests, self._thinking)
            yield chunk

    def _chunk(self, *choices: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._head.id,
            object="chat.completion.chunk",
            created=self._head.created,
            model=self._head.model,
            choices=list(choices),
            **({"usage": None} if self._body.include_usage else {}),
        )
