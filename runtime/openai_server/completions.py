"""``POST /v1/completions``: one prompt or several, without a chat template, each with ``n`` choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from fastapi import Request
from fastapi.responses import Response

from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.openai_server.http_errors import BAD_REQUEST, ApiError
from trimode.runtime.openai_server.request_bodies import COMPLETION_TOKENS, CompletionRequest
from trimode.runtime.openai_server.response_bodies import Completion, CompletionChoice, Usage
from trimode.runtime.openai_server.service import ResponseHead, Service, finish_reason, json_response, without_none
from trimode.runtime.openai_server.token_details import OriginsBuilder, completion_logprobs, prompt_logprobs
from trimode.runtime.request.outputs import CompletionOutput, Logprob


async def complete(service: Service, body: CompletionRequest, http: Request) -> Response:
    headers = service.report_ignored_fields(body, http)
    model = service.names.resolve(body.model)
    best_of = _best_of(body)
    prompts = await _token_ids(service, body)
    # A request emits at least one token, which a response of the prompt alone leaves out.
    length = 1 if body.echoes_alone else body.max_tokens
    lengths = [service.completion_length(prompt, body, length, default=COMPLETION_TOKENS) for prompt in prompts]
    requested = body.output_format()
    params = service.sampling_params(
        body,
        model,
        requested,
        max_tokens=max(lengths),
        n=best_of or body.n,
        logprobs=body.logprobs if best_of is None else body.logprobs or 0,
        prompt_logprobs=body.listed_prompt_logprobs,
    )
    of_prompts = [dataclasses.replace(params, max_tokens=length) for length in lengths]
    texts = [_prompt_text(service, body, index) for index in range(len(prompts))] if body.echo else [""] * len(prompts)
    head = service.head("cmpl", model)
    await service.compile_grammar(requested)
    run = service.running.start(prompts, of_prompts, streaming=bool(body.stream))
    answers = body.n or 1
    builders = [
        [_CompletionChoiceBuilder(service, body, answers * number, text) for _ in range(answers)]
        for number, text in enumerate(texts)
    ]
    if body.stream:
        chunks = _CompletionChunks(service, head, body, builders, run.requests)
        response = service.stream(run, (), chunks.of_update, chunks.last)
        response.headers.update(headers)
        return response
    with run:
        await run.finish(http)
        choices = []
        for request, of_prompt in zip(run.requests, builders, strict=True):
            service.metrics.observe(request)
            outputs = request.outputs if best_of is None else _best(request.outputs, answers)
            pairs = zip(of_prompt, outputs, strict=True)
            choices += [builder.whole(index, output, request) for index, (builder, output) in enumerate(pairs)]
        completion = _completion(head, choices)
        completion.usage = _usage(service, body, run.requests)
        return json_response(completion, headers)


def _best_of(body: CompletionRequest) -> int | None:
    """Candidates for each prompt, of which the best ``n`` are returned; None if that is all of them."""
    if body.best_of is None or body.best_of == (body.n or 1):
        return None
    if body.best_of < (body.n or 1):
        raise ApiError(BAD_REQUEST, f"best_of is {body.best_of}, less than n", "best_of")
    if body.stream:
        raise ApiError(BAD_REQUEST, "best_of cannot be streamed: the best completion is known at the end", "best_of")
    if body.temperature == 0:
        return None  # all candidates are the same
    return body.best_of


def _best(outputs: Sequence[CompletionOutput], count: int) -> list[CompletionOutput]:
    """By log-probability per token, as OpenAI documents it."""
    return sorted(outputs, key=lambda output: -(output.cumulative_logprob or 0.0) / output.length)[:count]


async def _token_ids(service: Service, body: CompletionRequest) -> list[list[int]]:
    prompt, special = body.prompt, body.add_special_tokens is not False
    if isinstance(prompt, str):
        return [await service.encode(prompt, body, special)]
    if isinstance(prompt[0], int):
        return [prompt]
    return [await service.encode(part, body, special) if isinstance(part, str) else part for part in prompt]


def _prompt_text(service: Service, body: CompletionRequest, index: int) -> str:
    """The text of ``echo``."""
    prompt = body.prompt if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt[index]
    if isinstance(prompt, str):
        return prompt
    return service.llm.tokenizer.decode(prompt, skip_special_tokens=body.skip_special_tokens is not False)


def _usage(service: Service, body: CompletionRequest, requests: Sequence[RequestOutput]) -> Usage:
    usage = service.usage(requests)
    if body.echoes_alone:
        usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
    return usage


def _completion(head: ResponseHead, choices: list[CompletionChoice]) -> Completion:
    return Completion(id=head.id, object="text_completion", created=head.created, model=head.model, choices=choices)


class _CompletionChoiceBuilder:
    """One choice, whole or in chunks. ``base``: the index of its prompt's first. ``prefix``: text before its own."""

    def __init__(self, service: Service, body: CompletionRequest, base: int, prefix: str) -> None:
        self._tokenizer = service.llm.tokenizer
        self._logprobs = body.logprobs is not None
        self._echoes = bool(body.echo)
        self._echoes_alone = body.echoes_alone
        self._prompt_logprobs = body.prompt_logprobs is not None
        self._base = base
        self._prefix = prefix
        self._origins = OriginsBuilder(self._tokenizer) if body.return_token_origins else None
        self._sent = 0  # tokens
        self._characters = 0
        self._finished = False

    def whole(self, index: int, output: CompletionOutput, request: RequestOutput) -> CompletionChoice:
        return self._choice(index, output, request, output.text, output.token_ids, output.logprobs or [])

    def chunk(self, output: CompletionOutput, request: RequestOutput) -> CompletionChoice | None:
        """What the latest update added; None if it added nothing to this choice."""
        if self._finished or not (output.length > self._sent or output.finish_reason):
            return None
        self._finished = output.finish_reason is not None
        choice = self._choice(
            output.index, output, request, output.text_diff, output.token_ids_diff, output.logprobs_diff
        )
        self._sent = output.length
        return choice

    def _choice(
        self,
        index: int,
        output: CompletionOutput,
        request: RequestOutput,
        text: str,
        token_ids: list[int],
        rows: Sequence[dict[int, Logprob]],
    ) -> CompletionChoice:
        reason = finish_reason(output)
        if self._echoes_alone:
            text, token_ids, rows, reason = "", [], [], reason and "length"
        of_prompt = None if self._sent else request.prompt_logprobs
        listed_ids, listed_rows = token_ids, list[dict[int, Logprob] | None](rows)
        if of_prompt is not None and self._echoes:
            listed_ids, listed_rows = [*request.prompt_token_ids, *token_ids], [*of_prompt, *rows]
        text, self._prefix = self._prefix + text, ""
        offset, self._characters = self._characters, self._characters + len(text)
        return CompletionChoice(
            index=self._base + index,
            text=text,
            finish_reason=reason,
            **without_none(
                logprobs=completion_logprobs(self._tokenizer, listed_ids, listed_rows, offset)
                if self._logprobs
                else None,
                prompt_logprobs=prompt_logprobs(self._tokenizer, of_prompt)
                if self._prompt_logprobs and of_prompt is not None
                else None,
                trimode=None if self._origins is None else self._origins.build(token_ids, output),
            ),
        )


class _CompletionChunks:
    """The chunks of one stream."""

    def __init__(
        self,
        service: Service,
        head: ResponseHead,
        body: CompletionRequest,
        builders: Sequence[Sequence[_CompletionChoiceBuilder]],
        requests: Sequence[RequestOutput],
    ) -> None:
        self._service = service
        self._head = head
        self._body = body
        self._builders = builders
        self._requests = requests

    def of_update(self, number: int, request: RequestOutput) -> Iterator[Completion]:
        for builder, output in zip(self._builders[number], request.outputs, strict=True):
            if choice := builder.chunk(output, request):
                chunk = _completion(self._head, [choice])
                if self._body.include_usage:
                    continuous = self._body.continuous_usage
                    chunk.usage = _usage(self._service, self._body, self._requests) if continuous else None
                yield chunk

    def last(self, _: Sequence[RequestOutput]) -> Iterator[Completion]:
        if self._body.include_usage:
            chunk = _completion(self._head, [])
            chunk.usage = _usage(self._service, self._body, self._requests)
            yield chunk
