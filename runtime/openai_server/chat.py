"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastapi import Request
from fastapi.responses import Response

from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.openai_server.http_errors import BAD_REQUEST, ApiError
from trimode.runtime.openai_server.reasoning import ReasoningSplitter, Split
from trimode.runtime.openai_server.request_bodies import NO_LIMIT, ChatCompletionRequest, ConversationBody
from trimode.runtime.openai_server.response_bodies import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Delta,
    TokenOrigins,
)
from trimode.runtime.openai_server.service import ResponseHead, Service, finish_reason, json_response, without_none
from trimode.runtime.openai_server.token_details import ChatLogprobsBuilder, OriginsBuilder
from trimode.runtime.request.outputs import CompletionOutput, Logprob


class EncodedChat(NamedTuple):
    """``thinking``: the prompt ends inside a thought, which the completion continues."""

    token_ids: list[int]
    thinking: bool


async def encode_chat(service: Service, body: ConversationBody) -> EncodedChat:
    """The conversation as the checkpoint's chat template renders it."""
    prompt = service.llm.tokenizer.chat_prompt(
        [message.turn() for message in body.messages],
        documents=body.documents or None,
        add_generation_prompt=body.generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        chat_template_kwargs=body.template_variables(service.llm.capacity.defaults.enable_thinking),
    )
    token_ids = await service.encode(prompt.text, body, add_special_tokens=bool(body.add_special_tokens))
    return EncodedChat(token_ids, prompt.thinking)


async def complete_chat(service: Service, body: ChatCompletionRequest, http: Request) -> Response:
    headers = service.report_ignored_fields(body, http)
    model = service.names.resolve(body.model)
    prompt = await encode_chat(service, body)
    params = service.sampling_params(
        body,
        model,
        max_tokens=service.completion_length(prompt.token_ids, body, _max_tokens(body)),
        logprobs=_logprobs(body),
    )
    head = service.head("chatcmpl", model)
    inputs = {"prompt_token_ids": prompt.token_ids, "thinking": prompt.thinking}
    await service.compile_grammar(body)
    run = service.running.start([inputs], [params], streaming=bool(body.stream))
    builders = [_ChatChoiceBuilder(service, body, prompt.thinking) for _ in range(params.n)]
    if body.stream:
        chunks = _ChatChunks(service, head, body, builders, run.requests, prompt.thinking)
        response = service.stream(run, chunks.first(), chunks.of_update, chunks.last)
        response.headers.update(headers)
        return response
    with run:
        await run.finish(http)
        (request,) = run.requests
        service.metrics.observe(request)
        choices = [builder.whole(output) for builder, output in zip(builders, request.outputs, strict=True)]
        completion = ChatCompletion(
            id=head.id,
            object="chat.completion",
            created=head.created,
            model=head.model,
            choices=choices,
            usage=service.usage(run.requests, prompt.thinking),
        )
        return json_response(completion, headers)


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    """``max_completion_tokens`` is the newer name of ``max_tokens``."""
    old, new = (None if length == NO_LIMIT else length for length in (body.max_tokens, body.max_completion_tokens))
    if old is not None and new is not None and old != new:
        message = f"max_tokens is {old} and max_completion_tokens is {new}; send one of them"
        raise ApiError(BAD_REQUEST, message, "max_tokens")
    return old if new is None else new


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise ApiError(BAD_REQUEST, "top_logprobs needs logprobs: true", "top_logprobs")
    return None


class _ChatChoiceBuilder:
    """One choice, whole or in chunks, with its reasoning separate from its content."""

    def __init__(self, service: Service, body: ChatCompletionRequest, thinking: bool) -> None:
        tokenizer, top = service.llm.tokenizer, _logprobs(body)
        skip = body.skip_special_tokens is not False
        self._logprobs = None if top is None else ChatLogprobsBuilder(tokenizer, top, thinking, skip)
        self._splitter = ReasoningSplitter(thinking)
        self._origins = OriginsBuilder(tokenizer) if body.return_token_origins else None
        self._sent = 0  # tokens
        self._finished = False

    def whole(self, output: CompletionOutput) -> ChatChoice:
        split = _joined(self._splitter.feed(output.text), self._splitter.finish())
        return ChatChoice(
            index=output.index,
            message=AssistantMessage(
                role="assistant", content=split.content, **without_none(reasoning_content=split.reasoning or None)
            ),
            finish_reason=finish_reason(output),
            **without_none(
                logprobs=self._build_logprobs(output.logprobs or (), split.content),
                trimode=self._build_origins(output.token_ids, output),
            ),
        )

    def chunk(self, output: CompletionOutput) -> ChatChunkChoice | None:
        """What the latest update added; None if it added nothing to this choice."""
        if self._finished or not (output.length > self._sent or output.finish_reason):
            return None
        self._sent = output.length
        split = self._splitter.feed(output.text_diff)
        if output.finish_reason is not None:
            self._finished = True
            split = _joined(split, self._splitter.finish())
        return ChatChunkChoice(
            index=output.index,
            delta=Delta(**without_none(reasoning_content=split.reasoning or None, content=split.content or None)),
            finish_reason=finish_reason(output),
            **without_none(
                logprobs=self._build_logprobs(output.logprobs_diff, split.content),
                trimode=self._build_origins(output.token_ids_diff, output),
            ),
        )

    def _build_logprobs(self, rows: Sequence[dict[int, Logprob]], content: str) -> ChatLogprobs | None:
        return None if self._logprobs is None else self._logprobs.build(rows, content)

    def _build_origins(self, token_ids: list[int], output: CompletionOutput) -> TokenOrigins | None:
        return None if self._origins is None else self._origins.build(token_ids, output)


def _joined(first: Split, second: Split) -> Split:
    return Split(first.reasoning + second.reasoning, first.content + second.content)


class _ChatChunks:
    """The chunks of one stream."""

    def __init__(
        self,
        service: Service,
        head: ResponseHead,
        body: ChatCompletionRequest,
        builders: Sequence[_ChatChoiceBuilder],
        requests: Sequence[RequestOutput],
        thinking: bool,
    ) -> None:
        self._service = service
        self._head = head
        self._body = body
        self._builders = builders
        self._requests = requests
        self._thinking = thinking

    def first(self) -> Iterator[ChatCompletionChunk]:
        for index in range(len(self._builders)):
            delta = Delta(role="assistant", content="")
            yield self._chunk(ChatChunkChoice(index=index, delta=delta, finish_reason=None))

    def of_update(self, _: int, request: RequestOutput) -> Iterator[ChatCompletionChunk]:
        for builder, output in zip(self._builders, request.outputs, strict=True):
            if choice := builder.chunk(output):
                yield self._chunk(choice)

    def last(self, _: Sequence[RequestOutput]) -> Iterator[ChatCompletionChunk]:
        if self._body.include_usage:
            chunk = self._chunk()
            chunk.usage = self._service.usage(self._requests, self._thinking)
            yield chunk

    def _chunk(self, *choices: ChatChunkChoice) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._head.id,
            object="chat.completion.chunk",
            created=self._head.created,
            model=self._head.model,
            choices=list(choices),
        )
        if self._body.include_usage:
            continuous = self._body.continuous_usage
            chunk.usage = self._service.usage(self._requests, self._thinking) if continuous else None
        return chunk
