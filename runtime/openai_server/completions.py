"""``POST /v1/completions``: prompts as they are, one or several, each with ``n`` answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from trimode.runtime.api.llm import RequestOutput
from trimode.runtime.openai_server.schema import (
    COMPLETION_TOKENS,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Prompt,
)
from trimode.runtime.openai_server.service import Head, Service, ended, json_response, some
from trimode.runtime.openai_server.tokens import OriginsTeller, completion_logprobs
from trimode.runtime.request.outputs import CompletionOutput, Logprob


async def complete(service: Service, body: CompletionRequest, http: Request) -> Response:
    service.require_model(body.model)
    service.require_stream(body.stream, body.stream_options)
    prompts = await _encoded(service, body.prompt)
    params = body.sampling_params(max_tokens=body.max_tokens or COMPLETION_TOKENS)
    head = service.head("cmpl")
    run = service.running.start(prompts, params, streaming=bool(body.stream))
    tellers = [[_Teller(service, body, params.n * number) for _ in range(params.n)] for number in range(len(prompts))]
    if body.stream:
        chunks = _Chunks(service, head, body, tellers)
        return service.stream(run, (), chunks.tell, chunks.last)
    with run:
        await run.finish(http)
        choices = []
        for request, answers in zip(run.requests, tellers, strict=True):
            service.metrics.observe(request)
            choices += [teller.whole(output) for teller, output in zip(answers, request.outputs, strict=True)]
        return json_response(_completion(head, choices, usage=service.usage(run.requests)))


async def _encoded(service: Service, prompt: Prompt) -> list[list[int]]:
    if isinstance(prompt, str):
        return [await service.encode(prompt, add_special_tokens=True)]
    if isinstance(prompt[0], int):
        return [prompt]
    return [await service.encode(part, add_special_tokens=True) if isinstance(part, str) else part for part in prompt]


def _completion(head: Head, choices: list[CompletionChoice], **usage: Any) -> Completion:
    return Completion(
        id=head.id,
        object="text_completion",
        created=head.created,
        model=head.model,
        choices=choices,
        **usage,
    )


class _Teller:
    """One choice, whole or as it comes; ``base`` is the index of its prompt's first."""

    def __init__(self, service: Service, body: CompletionRequest, base: int) -> None:
        self._tokenizer = service.llm.tokenizer
        self._logprobs = body.logprobs is not None
        self._base = base
        self._origins = OriginsTeller(self._tokenizer) if body.return_token_origins else None
        self._told = 0  # tokens
        self._characters = 0
        self._finished = False

    def whole(self, output: CompletionOutput) -> CompletionChoice:
        return self._choice(output, output.text, output.token_ids, output.logprobs or [])

    def update(self, output: CompletionOutput) -> CompletionChoice | None:
        """What the latest update brought; None if it was another answer's."""
        if self._finished or not (output.length > self._told or output.finish_reason):
            return None
        self._told = output.length
        self._finished = output.finish_reason is not None
        return self._choice(output, output.text_diff, output.token_ids_diff, output.logprobs_diff)

    def _choice(
        self, output: CompletionOutput, text: str, token_ids: list[int], rows: Sequence[dict[int, Logprob]]
    ) -> CompletionChoice:
        offset, self._characters = self._characters, self._characters + len(text)
        return CompletionChoice(
            index=self._base + output.index,
            text=text,
            finish_reason=ended(output),
            **some(
                logprobs=completion_logprobs(self._tokenizer, rows, offset) if self._logprobs else None,
                trimode=None if self._origins is None else self._origins.tell(token_ids, output),
            ),
        )


class _Chunks:
    def __init__(
        self, service: Service, head: Head, body: CompletionRequest, tellers: Sequence[Sequence[_Teller]]
    ) -> None:
        self._service = service
        self._head = head
        self._body = body
        self._tellers = tellers
        self._no_usage = {"usage": None} if body.include_usage else {}

    def tell(self, number: int, request: RequestOutput) -> Iterator[Completion]:
        for teller, output in zip(self._tellers[number], request.outputs, strict=True):
            if choice := teller.update(output):
                yield _completion(self._head, [choice], **self._no_usage)

    def last(self, requests: Sequence[RequestOutput]) -> Iterator[Completion]:
        if self._body.include_usage:
            yield _completion(self._head, [], usage=self._service.usage(requests))
