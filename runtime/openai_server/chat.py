"""``POST /v1/chat/completions``."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastapi import Request
from fastapi.responses import Response

from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.openai_server.answer_splitter import AnswerSplitter
from trimode.runtime.openai_server.http_errors import BAD_REQUEST, ApiError
from trimode.runtime.openai_server.model_names import ModelName
from trimode.runtime.openai_server.request_bodies import NO_LIMIT, ChatCompletionRequest, ConversationBody
from trimode.runtime.openai_server.response_bodies import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Delta,
    FinishReason,
    FunctionCall,
    FunctionCallDelta,
    TokenOrigins,
    ToolCall,
    ToolCallDelta,
)
from trimode.runtime.openai_server.running import Run
from trimode.runtime.openai_server.service import ResponseHead, Service, finish_reason, json_response, without_none
from trimode.runtime.openai_server.token_details import ChatLogprobsBuilder, OriginsBuilder
from trimode.runtime.openai_server.tools.call_splitter import CallDelta
from trimode.runtime.openai_server.tools.format_with_tools import format_with_tools
from trimode.runtime.request.outputs import CompletionOutput, Logprob
from trimode.runtime.request.sampling_params import SamplingParams


class EncodedChat(NamedTuple):
    """``thinking``: the prompt ends inside a thought, which the completion continues."""

    token_ids: list[int]
    thinking: bool


class StartedChat(NamedTuple):
    """A chat that is being answered. splitters: one for each of its answers."""

    prompt: EncodedChat
    params: SamplingParams
    run: Run
    splitters: list[AnswerSplitter]

    @property
    def request(self) -> RequestOutput:
        return self.run.requests[0]


async def encode_chat(service: Service, body: ConversationBody) -> EncodedChat:
    """The conversation as the checkpoint's chat template renders it."""
    prompt = service.llm.tokenizer.chat_prompt(
        [message.turn() for message in body.messages],
        tools=body.shown_tools,
        documents=body.documents or None,
        add_generation_prompt=body.generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        chat_template_kwargs=body.template_variables(service.llm.capacity.defaults.enable_thinking),
    )
    token_ids = await service.encode(prompt.text, body, add_special_tokens=bool(body.add_special_tokens))
    return EncodedChat(token_ids, prompt.thinking)


async def start_chat(service: Service, body: ChatCompletionRequest, model: ModelName) -> StartedChat:
    """Begin to answer. The caller ends the run."""
    prompt = await encode_chat(service, body)
    choice, syntax = body.callable_tools, service.call_syntax
    requested = body.output_format()
    if choice is not None:
        requested = format_with_tools(syntax, choice, requested)
    params = service.sampling_params(
        body,
        model,
        requested,
        max_tokens=service.completion_length(prompt.token_ids, body, _max_tokens(body)),
        logprobs=_logprobs(body),
        # The marks of calls may be special tokens.
        skip_special_tokens=body.skip_special_tokens is not False and not (choice and syntax.has_special_marks),
    )
    await service.compile_grammar(requested)
    inputs = {"prompt_token_ids": prompt.token_ids, "thinking": prompt.thinking}
    run = service.running.start([inputs], [params], streaming=bool(body.stream))
    splitters = [
        AnswerSplitter(prompt.thinking, None if choice is None else syntax.splitter(choice.tools))
        for _ in range(params.n)
    ]
    return StartedChat(prompt, params, run, splitters)


async def complete_chat(service: Service, body: ChatCompletionRequest, http: Request) -> Response:
    headers = service.report_ignored_fields(body, http)
    model = service.names.resolve(body.model)
    chat = await start_chat(service, body, model)
    head = service.head("chatcmpl", model)
    builders = [_ChatChoiceBuilder(service, body, chat, splitter) for splitter in chat.splitters]
    if body.stream:
        chunks = _ChatChunks(service, head, body, builders, chat)
        response = service.stream(chat.run, chunks.first(), chunks.of_update, chunks.last)
        response.headers.update(headers)
        return response
    with chat.run as run:
        await run.finish(http)
        service.metrics.observe(chat.request)
        choices = [builder.whole(output) for builder, output in zip(builders, chat.request.outputs, strict=True)]
        completion = ChatCompletion(
            id=head.id,
            object="chat.completion",
            created=head.created,
            model=head.model,
            choices=choices,
            usage=service.usage(run.requests, chat.prompt.thinking),
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


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class _ChatChoiceBuilder:
    """One choice, whole or in chunks, with its reasoning and its tool calls separate from its content."""

    def __init__(
        self, service: Service, body: ChatCompletionRequest, chat: StartedChat, splitter: AnswerSplitter
    ) -> None:
        tokenizer, top, skip = service.llm.tokenizer, _logprobs(body), chat.params.skip_special_tokens
        self._logprobs = None if top is None else ChatLogprobsBuilder(tokenizer, top, chat.prompt.thinking, skip)
        self._splitter = splitter
        self._origins = OriginsBuilder(tokenizer) if body.return_token_origins else None
        self._sent = 0  # tokens
        self._finished = False

    def whole(self, output: CompletionOutput) -> ChatChoice:
        answer = self._splitter.whole(output.text)
        calls = [
            ToolCall(id=new_call_id(), type="function", function=FunctionCall(**call._asdict()))
            for call in answer.calls
        ]
        return ChatChoice(
            index=output.index,
            message=AssistantMessage(
                role="assistant",
                content=answer.content or (None if calls else ""),
                **without_none(reasoning_content=answer.reasoning or None, tool_calls=calls or None),
            ),
            finish_reason=_finish_reason(output, bool(calls)),
            **without_none(
                logprobs=self._build_logprobs(output.logprobs or (), answer.content),
                trimode=self._build_origins(output.token_ids, output),
            ),
        )

    def chunks(self, output: CompletionOutput) -> Iterator[ChatChunkChoice]:
        """What the latest update added, nothing if it added nothing to this choice.

        The end after a call is a chunk of its own: OpenAI's client does not report the end of a call whose last
        arguments come with the ``finish_reason``.
        """
        if self._finished or not (output.length > self._sent or output.finish_reason):
            return
        self._sent = output.length
        piece = self._splitter.feed(output.text_diff)
        if output.finish_reason is not None:
            self._finished = True
            piece.add(self._splitter.finish())
        reason = _finish_reason(output, self._splitter.has_calls)
        apart = reason is not None and bool(piece.calls)
        yield ChatChunkChoice(
            index=output.index,
            delta=Delta(
                **without_none(
                    reasoning_content=piece.reasoning or None,
                    content=piece.content or None,
                    tool_calls=[_tool_call_delta(call) for call in piece.calls] or None,
                )
            ),
            finish_reason=None if apart else reason,
            **without_none(
                logprobs=self._build_logprobs(output.logprobs_diff, piece.content),
                trimode=self._build_origins(output.token_ids_diff, output),
            ),
        )
        if apart:
            yield ChatChunkChoice(index=output.index, delta=Delta(), finish_reason=reason)

    def _build_logprobs(self, rows: Sequence[dict[int, Logprob]], content: str) -> ChatLogprobs | None:
        return None if self._logprobs is None else self._logprobs.build(rows, content)

    def _build_origins(self, token_ids: list[int], output: CompletionOutput) -> TokenOrigins | None:
        return None if self._origins is None else self._origins.build(token_ids, output)


def _tool_call_delta(delta: CallDelta) -> ToolCallDelta:
    if delta.name is None:
        return ToolCallDelta(index=delta.number, function=FunctionCallDelta(arguments=delta.arguments))
    function = FunctionCallDelta(name=delta.name, arguments=delta.arguments)
    return ToolCallDelta(index=delta.number, id=new_call_id(), type="function", function=function)


def _finish_reason(output: CompletionOutput, has_calls: bool) -> FinishReason | None:
    """A text that ends by itself after calls ends for the calls."""
    reason = finish_reason(output)
    return "tool_calls" if has_calls and reason == "stop" else reason


class _ChatChunks:
    """The chunks of one stream."""

    def __init__(
        self,
        service: Service,
        head: ResponseHead,
        body: ChatCompletionRequest,
        builders: Sequence[_ChatChoiceBuilder],
        chat: StartedChat,
    ) -> None:
        self._service = service
        self._head = head
        self._body = body
        self._builders = builders
        self._requests = chat.run.requests
        self._thinking = chat.prompt.thinking

    def first(self) -> Iterator[ChatCompletionChunk]:
        for index in range(len(self._builders)):
            delta = Delta(role="assistant", content="")
            yield self._chunk(ChatChunkChoice(index=index, delta=delta, finish_reason=None))

    def of_update(self, _: int, request: RequestOutput) -> Iterator[ChatCompletionChunk]:
        for builder, output in zip(self._builders, request.outputs, strict=True):
            for choice in builder.chunks(output):
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
