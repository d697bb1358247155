"""Details of single tokens: text, origin and log-probabilities, for whole responses and for streams."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Sequence

from tokenizers.decoders import DecodeStream

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.openai_server.reasoning import CLOSE, OPEN
from trimode.runtime.openai_server.response_bodies import (
    ChatLogprobs,
    CompletionLogprobs,
    DraftedCycle,
    PassCounts,
    PromptLogprob,
    TokenLogprob,
    TokenOrigins,
    TopLogprob,
)
from trimode.runtime.request.cycle_reason import cycle_reason
from trimode.runtime.request.outputs import CompletionOutput, Cycle, Logprob, PromptLogprobs

# OpenAI's value for a token of almost no probability; JSON has no infinity.
LEAST_LOGPROB = -9999.0
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class OriginsBuilder:
    """The :class:`TokenOrigins` of one choice, update by update."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._cycles = 0  # built

    def build(self, token_ids: Sequence[int], output: CompletionOutput) -> TokenOrigins:
        """``token_ids``: the newest tokens of ``output``."""
        counts = dataclasses.asdict(output.counts)
        begin, self._cycles = self._cycles, len(output.cycles)
        return TokenOrigins(
            pieces=[self._tokenizer.step(self._stream, token) or "" for token in token_ids],
            origins=list(output.origins[len(output.origins) - len(token_ids) :]),
            rejected=[_text(self._tokenizer, token) for token in output.rejected],
            cycles=[self._cycle(cycle) for cycle in output.cycles[begin:]],
            passes=PassCounts(**{name: counts[name] for name in PassCounts.model_fields}),
        )

    def _cycle(self, cycle: Cycle) -> DraftedCycle:
        *counts, record = cycle
        if record is None:
            raise ValueError("the request does not record its drafts")
        return DraftedCycle(
            **dict(zip(Cycle._fields, counts, strict=False)),
            pieces=[_text(self._tokenizer, token) for token in record.tokens],
            parents=record.parents,
            path=record.path,
            reason=cycle_reason(cycle),
        )


class ChatLogprobsBuilder:
    """The :class:`ChatLogprobs` of one choice, update by update: those of the tokens that form its content.

    Tokens of reasoning, of a stop string, and tokens without text are left out.
    top: number of alternatives to list with each token. thinking: the prompt ends inside a thought.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, thinking: bool, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._open, self._close = (tokenizer.token_id(mark) for mark in (OPEN, CLOSE))
        self._thinking: bool | None = thinking or None  # None: the first token may open a thought
        self._pending: deque[tuple[int, dict[int, Logprob]]] = deque()  # (characters that the token completes, row)
        self._missing = 0  # characters of the content that no token listed so far has completed

    def build(self, rows: Iterable[dict[int, Logprob]], content: str) -> ChatLogprobs:
        """``rows``: of the newest tokens. ``content``: the newest text, which may lag behind the rows."""
        self._missing += len(content)
        self._pending += [
            (len(self._tokenizer.step(self._stream, token) or ""), row)
            for row in rows
            if self._is_content(token := next(iter(row)))
        ]
        listed = []
        while self._pending and self._missing > 0:
            length, row = self._pending.popleft()
            self._missing -= length
            listed.append(self._token_logprob(row))
        return ChatLogprobs(content=listed)

    def _is_content(self, token: int) -> bool:
        if self._thinking is None:
            self._thinking = token == self._open
        if self._thinking:
            self._thinking = token != self._close
            return False
        return bool(self._tokenizer.decode([token], self._skip_special_tokens))

    def _token_logprob(self, row: dict[int, Logprob]) -> TokenLogprob:
        entries = {token: _entry(self._tokenizer, token, found) for token, found in row.items()}
        likeliest = sorted(row, key=lambda token: row[token].rank or math.inf)[: self._top]
        chosen = entries[next(iter(row))]
        return TokenLogprob(**chosen.model_dump(), top_logprobs=[entries[token] for token in likeliest])


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], rows: Sequence[dict[int, Logprob] | None], offset: int
) -> CompletionLogprobs:
    """``rows``: of these tokens, None for a prompt's first. ``offset``: characters of the text before them."""
    tokens = [_text(tokenizer, token) for token in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[None if row is None else _finite(next(iter(row.values())).logprob) for row in rows],
        top_logprobs=[
            None if row is None else {_text(tokenizer, token): _finite(found.logprob) for token, found in row.items()}
            for row in rows
        ],
        text_offset=offsets,
    )


def prompt_logprobs(tokenizer: Tokenizer, rows: PromptLogprobs) -> list[dict[str, PromptLogprob] | None]:
    """In vLLM's shape: by token id."""
    return [
        None
        if row is None
        else {
            str(token): PromptLogprob(
                logprob=_finite(found.logprob), rank=found.rank, decoded_token=_text(tokenizer, token)
            )
            for token, found in row.items()
        }
        for row in rows
    ]


def _entry(tokenizer: Tokenizer, token: int, found: Logprob) -> TopLogprob:
    """``bytes`` is None for a token that is part of a character."""
    text = _text(tokenizer, token)
    return TopLogprob(
        token=text,
        logprob=_finite(found.logprob),
        bytes=None if _UNFINISHED in text else list(text.encode()),
    )


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
