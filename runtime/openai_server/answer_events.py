"""An answer to one chat as the events of an API: ``/v1/responses`` and ``/v1/messages``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from fastapi import Request
from fastapi.responses import Response

from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.openai_server.answer_splitter import AnswerPiece
from trimode.runtime.openai_server.chat import StartedChat
from trimode.runtime.openai_server.response_bodies import NamedEvent, ResponseBody
from trimode.runtime.openai_server.service import Service, json_response

E = TypeVar("E", bound=NamedEvent)


class AnswerEvents(ABC, Generic[E]):
    """Each API builds its own events, and its own record of the whole answer."""

    def __init__(self, service: Service, chat: StartedChat) -> None:
        self._service = service
        self._chat = chat
        self._splitter = chat.splitters[0]
        self._finished = False

    async def respond(self, stream: bool, headers: dict[str, str], http: Request) -> Response:
        """Send the events as they come, or the whole answer when it is there."""
        if stream:
            response = self._service.stream(
                self._chat.run,
                self.first(),
                self.of_update,
                self.last,
                write=NamedEvent.event_text,
                failure=self.failure,
                end="",
            )
            response.headers.update(headers)
            return response
        with self._chat.run as run:
            await run.finish(http)
            self._service.metrics.observe(self._chat.request)
            return json_response(self.whole(), headers)

    def of_update(self, _: int, request: RequestOutput) -> Iterator[E]:
        output = request.outputs[0]
        piece = self._splitter.feed(output.text_diff)
        if output.finish_reason is not None and not self._finished:
            self._finished = True
            piece.add(self._splitter.finish())
        yield from self._of_piece(piece)

    @abstractmethod
    def whole(self) -> ResponseBody: ...

    @abstractmethod
    def first(self) -> Iterator[E]: ...

    @abstractmethod
    def last(self, _: Sequence[RequestOutput]) -> Iterator[E]: ...

    @abstractmethod
    def failure(self, error: Exception) -> E: ...

    @abstractmethod
    def _of_piece(self, piece: AnswerPiece) -> Iterator[E]: ...
