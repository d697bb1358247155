"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's API, as a chat."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.openai_server.answer_events import AnswerEvents
from trimode.runtime.openai_server.answer_splitter import AnswerPiece
from trimode.runtime.openai_server.anthropic_bodies import (
    CountTokensRequest,
    MessageEvent,
    MessageRecord,
    MessagesRequest,
    MessagesUsage,
    StopReason,
    TokenCount,
)
from trimode.runtime.openai_server.chat import StartedChat, encode_chat, start_chat
from trimode.runtime.openai_server.http_errors import messages_error
from trimode.runtime.openai_server.model_names import ModelName
from trimode.runtime.openai_server.service import Service, json_response


async def create_message(service: Service, body: MessagesRequest, http: Request) -> Response:
    headers = service.report_ignored_fields(body, http)
    model = service.names.resolve(body.model)
    chat = await start_chat(service, body.as_chat(), model)
    return await _Events(service, chat, model).respond(bool(body.stream), headers, http)


async def count_tokens(service: Service, body: CountTokensRequest, http: Request) -> Response:
    headers = service.report_ignored_fields(body, http)
    service.names.resolve(body.model)
    prompt = await encode_chat(service, body.as_chat())
    return json_response(TokenCount(input_tokens=len(prompt.token_ids)), headers)


class _Events(AnswerEvents[MessageEvent]):
    """The events of one message. Its content is a thought, a text and tool calls, in this order."""

    def __init__(self, service: Service, chat: StartedChat, model: ModelName) -> None:
        super().__init__(service, chat)
        self._model = model
        self._id = f"msg_{uuid.uuid4().hex}"
        self._index = -1  # of the latest block
        self._open: str | None = None  # its type, while it grows

    def whole(self) -> MessageRecord:
        answer = self._splitter.whole(self._chat.request.outputs[0].text)
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        if answer.content or not answer.calls:
            content.append({"type": "text", "text": answer.content, "citations": None})
        content += [_tool_use(call.name, json.loads(call.arguments or "{}")) for call in answer.calls]
        return self._record(content, self._stop_reason(bool(answer.calls)))

    def first(self) -> Iterator[MessageEvent]:
        yield MessageEvent(type="message_start", message=self._record([], None))

    def last(self, _: Sequence[RequestOutput]) -> Iterator[MessageEvent]:
        if self._index < 0:
            yield from self._begin({"type": "text", "text": "", "citations": None})
        yield from self._close()
        reason = self._stop_reason(self._splitter.has_calls)
        delta = {"stop_reason": reason, "stop_sequence": self._stop_sequence(reason)}
        yield MessageEvent(type="message_delta", delta=delta, usage=self._usage())
        yield MessageEvent(type="message_stop")

    def failure(self, error: Exception) -> MessageEvent:
        return MessageEvent(type="error", error=messages_error(error).error)

    def _of_piece(self, piece: AnswerPiece) -> Iterator[MessageEvent]:
        if piece.reasoning:
            if self._open != "thinking":
                yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": piece.reasoning})
        if piece.content:
            if self._open != "text":
                yield from self._begin({"type": "text", "text": "", "citations": None})
            yield self._delta({"type": "text_delta", "text": piece.content})
        for call in piece.calls:
            if call.name is not None:
                yield from self._begin(_tool_use(call.name, {}))
            if call.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def _begin(self, block: dict[str, Any]) -> Iterator[MessageEvent]:
        yield from self._close()
        self._index += 1
        self._open = block["type"]
        yield MessageEvent(type="content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> MessageEvent:
        return MessageEvent(type="content_block_delta", index=self._index, delta=delta)

    def _close(self) -> Iterator[MessageEvent]:
        if self._open is not None:
            self._open = None
            yield MessageEvent(type="content_block_stop", index=self._index)

    def _stop_reason(self, has_calls: bool) -> StopReason:
        output = self._chat.request.outputs[0]
        if output.finish_reason == "length":
            return "max_tokens"
        if isinstance(output.stop_reason, str):
            return "stop_sequence"
        return "tool_use" if has_calls else "end_turn"

    def _stop_sequence(self, reason: StopReason | None) -> str | None:
        return str(self._chat.request.outputs[0].stop_reason) if reason == "stop_sequence" else None

    def _record(self, content: list[dict[str, Any]], reason: StopReason | None) -> MessageRecord:
        return MessageRecord(
            id=self._id,
            type="message",
            role="assistant",
            model=self._model.name,
            content=content,
            stop_reason=reason,
            stop_sequence=self._stop_sequence(reason),
            usage=self._usage(),
        )

    def _usage(self) -> MessagesUsage:
        usage = self._service.usage(self._chat.run.requests, self._chat.prompt.thinking)
        cached = usage.prompt_tokens_details.cached_tokens
        return MessagesUsage(
            input_tokens=usage.prompt_tokens - cached,
            output_tokens=usage.completion_tokens,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=cached,
        )


def _tool_use(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": arguments}
