"""``POST /v1/responses``: OpenAI's newer API, stateless."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.openai_server.answer_events import AnswerEvents
from trimode.runtime.openai_server.answer_splitter import AnswerPiece
from trimode.runtime.openai_server.chat import StartedChat, new_call_id, start_chat
from trimode.runtime.openai_server.http_errors import error_body
from trimode.runtime.openai_server.responses_bodies import (
    IncompleteDetails,
    InputTokensDetails,
    OutputItem,
    OutputPart,
    OutputTokensDetails,
    ResponseEvent,
    ResponseRecord,
    ResponsesRequest,
    ResponseUsage,
    Status,
    echoed_tools,
)
from trimode.runtime.openai_server.service import ResponseHead, Service


async def respond(service: Service, body: ResponsesRequest, http: Request) -> Response:
    headers = service.report_ignored_fields(body, http)
    model = service.names.resolve(body.model)
    chat = await start_chat(service, body.as_chat(), model)
    events = _Events(service, body, chat, service.head("resp", model))
    return await events.respond(bool(body.stream), headers, http)


class _Events(AnswerEvents[ResponseEvent]):
    """The events of one response. Its output is reasoning, a message and function calls, in this order."""

    def __init__(self, service: Service, body: ResponsesRequest, chat: StartedChat, head: ResponseHead) -> None:
        super().__init__(service, chat)
        self._body = body
        self._head = head
        self._number = -1  # of the latest event
        self._output: list[OutputItem] = []
        self._open: OutputItem | None = None  # the latest item, while it grows
        self._part = OutputPart(type="output_text", text="")  # of the open item, unless that is a call

    def whole(self) -> ResponseRecord:
        piece = self._splitter.feed(self._chat.request.outputs[0].text)
        piece.add(self._splitter.finish())
        for _ in (*self._of_piece(piece), *self._ending()):
            pass
        return self._record(self._status)

    def first(self) -> Iterator[ResponseEvent]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._record("in_progress"))

    def last(self, _: Sequence[RequestOutput]) -> Iterator[ResponseEvent]:
        yield from self._ending()
        yield self._event(f"response.{self._status}", response=self._record(self._status))

    @property
    def _status(self) -> Status:
        """Of the finished response."""
        return "incomplete" if self._chat.request.outputs[0].finish_reason == "length" else "completed"

    def _ending(self) -> Iterator[ResponseEvent]:
        """A call that was cut off is an incomplete item. There is at least one item."""
        if not self._output:
            yield from self._begin_text("message")
        yield from self._close(self._status)

    def failure(self, error: Exception) -> ResponseEvent:
        detail = error_body(error).error
        return self._event("error", code=detail.code, message=detail.message, param=detail.param)

    def _of_piece(self, piece: AnswerPiece) -> Iterator[ResponseEvent]:
        if piece.reasoning:
            yield from self._text("reasoning", piece.reasoning)
        if piece.content:
            yield from self._text("message", piece.content)
        for delta in piece.calls:
            if delta.name is not None:
                yield from self._close("completed")
                yield from self._begin(
                    OutputItem(
                        id=f"fc_{uuid.uuid4().hex}",
                        type="function_call",
                        status="in_progress",
                        call_id=new_call_id(),
                        name=delta.name,
                        arguments="",
                    )
                )
            if delta.arguments and self._open is not None:
                self._open.arguments = (self._open.arguments or "") + delta.arguments
                yield self._item_event("response.function_call_arguments.delta", delta=delta.arguments)

    def _text(self, kind: str, text: str) -> Iterator[ResponseEvent]:
        if self._open is None or self._open.type != kind:
            yield from self._close("completed")
            yield from self._begin_text(kind)
        self._part.text += text
        yield self._part_event(f"response.{self._part.type}.delta", delta=text, **_logprobs(self._part))

    def _begin_text(self, kind: str) -> Iterator[ResponseEvent]:
        identity = uuid.uuid4().hex
        if kind == "message":
            item = OutputItem(id=f"msg_{identity}", type="message", status="in_progress", role="assistant", content=[])
            self._part = OutputPart(type="output_text", text="", annotations=[], logprobs=[])
        else:
            item = OutputItem(id=f"rs_{identity}", type="reasoning", status="in_progress", summary=[], content=[])
            self._part = OutputPart(type="reasoning_text", text="")
        yield from self._begin(item)
        item.content = [self._part]
        yield self._part_event("response.content_part.added", part=self._part)

    def _begin(self, item: OutputItem) -> Iterator[ResponseEvent]:
        self._open = item
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _close(self, status: Status) -> Iterator[ResponseEvent]:
        """End the open item."""
        item = self._open
        if item is None:
            return
        if item.type == "function_call":
            name, arguments = item.name, item.arguments
            yield self._item_event("response.function_call_arguments.done", name=name, arguments=arguments)
        else:
            part = self._part
            yield self._part_event(f"response.{part.type}.done", text=part.text, **_logprobs(part))
            yield self._part_event("response.content_part.done", part=part)
        item.status = status
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)
        self._open = None

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(type=kind, sequence_number=self._number, **fields)

    def _item_event(self, kind: str, **fields: Any) -> ResponseEvent:
        return self._event(kind, item_id=self._output[-1].id, output_index=len(self._output) - 1, **fields)

    def _part_event(self, kind: str, **fields: Any) -> ResponseEvent:
        return self._item_event(kind, content_index=0, **fields)

    def _record(self, status: Status) -> ResponseRecord:
        body = self._body
        text = {"format": (body.text.format if body.text else None) or {"type": "text"}}
        choice = body.tool_choice or "auto"
        return ResponseRecord(
            id=self._head.id,
            object="response",
            created_at=self._head.created,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            background=False,
            error=None,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=None,
            metadata=body.metadata or {},
            model=self._head.model,
            output=self._output,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=None,
            reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            service_tier="default",
            store=False,
            temperature=body.temperature,
            text=text,
            tool_choice=choice if isinstance(choice, str) else {"type": "function", "name": choice.name},
            tools=echoed_tools(body),
            top_p=body.top_p,
            truncation="disabled",
            usage=None if status == "in_progress" else self._usage(),
        )

    def _usage(self) -> ResponseUsage:
        usage = self._service.usage(self._chat.run.requests, self._chat.prompt.thinking)
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=usage.prompt_tokens_details.cached_tokens, cache_write_tokens=0
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(
                reasoning_tokens=usage.completion_tokens_details.reasoning_tokens
            ),
            total_tokens=usage.total_tokens,
        )


def _logprobs(part: OutputPart) -> dict[str, Any]:
    """The API's text events have this list; log-probabilities are not supported here."""
    return {"logprobs": []} if part.type == "output_text" else {}
