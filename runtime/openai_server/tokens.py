"""Tokens one by one, as answers tell them: their text, how they came, and how likely they were."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence

from tokenizers.decoders import DecodeStream

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.openai_server.reasoning import CLOSE, OPEN
from trimode.runtime.openai_server.schema import (
    ChatLogprobs,
    CompletionLogprobs,
    Passes,
    TokenLogprob,
    TokenOrigins,
    TopLogprob,
)
from trimode.runtime.request.outputs import CompletionOutput, Logprob

# What OpenAI gives for a token that is all but impossible; JSON has no infinity.
LEAST_LOGPROB = -9999.0
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class OriginsTeller:
    """The :class:`TokenOrigins` of an answer's successive updates."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def tell(self, token_ids: Sequence[int], output: CompletionOutput) -> TokenOrigins:
        """``token_ids`` are the newest tokens of ``output``."""
        counts = dataclasses.asdict(output.counts)
        return TokenOrigins(
            pieces=[self._tokenizer.step(self._stream, token) or "" for token in token_ids],
            origins=list(output.origins[len(output.origins) - len(token_ids) :]),
            rejected=[_text(self._tokenizer, token) for token in output.rejected],
            passes=Passes(**{name: counts[name] for name in Passes.model_fields}),
        )


class LikelihoodsTeller:
    """The :class:`ChatLogprobs` of an answer's successive updates: of the tokens that make its content. Those of its
    thought and of a stop string are not among them, nor those that are no text.

    top: the number of the likeliest to list with each token. thinking: the prompt left a thought open.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, thinking: bool, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._open, self._close = (tokenizer.token_id(mark) for mark in (OPEN, CLOSE))
        self._thinking: bool | None = thinking or None  # None: it may yet begin
        self._untold: deque[tuple[int, dict[int, Logprob]]] = deque()  # with the characters that a token completes
        self._missing = 0  # characters of the content that no token told so far has completed

    def tell(self, rows: Iterable[dict[int, Logprob]], content: str) -> ChatLogprobs:
        """``rows`` and ``content`` are what is newest; the content may lag behind the rows."""
        self._missing += len(content)
        self._untold += [
            (len(self._tokenizer.step(self._stream, token) or ""), row)
            for row in rows
            if self._makes_content(token := next(iter(row)))
        ]
        told = []
        while self._untold and self._missing > 0:
            length, row = self._untold.popleft()
            self._missing -= length
            told.append(self._likelihoods(row))
        return ChatLogprobs(content=told)

    def _makes_content(self, token: int) -> bool:
        if self._thinking is None:
            self._thinking = token == self._open
        if self._thinking:
            self._thinking = token != self._close
            return False
        return bool(self._tokenizer.decode([token], self._skip_special_tokens))

    def _likelihoods(self, row: dict[int, Logprob]) -> TokenLogprob:
        entries = {token: _entry(self._tokenizer, token, found) for token, found in row.items()}
        likeliest = sorted(row, key=lambda token: row[token].rank)[: self._top]
        chosen = entries[next(iter(row))]
        return TokenLogprob(**chosen.model_dump(), top_logprobs=[entries[token] for token in likeliest])


def completion_logprobs(tokenizer: Tokenizer, rows: Sequence[dict[int, Logprob]], offset: int) -> CompletionLogprobs:
    """``offset``: characters of the answer before these tokens."""
    tokens = [_text(tokenizer, next(iter(row))) for row in rows]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[_finite(next(iter(row.values())).logprob) for row in rows],
        top_logprobs=[
            {_text(tokenizer, token): _finite(found.logprob) for token, found in row.items()} for row in rows
        ],
        text_offset=offsets,
    )


def _entry(tokenizer: Tokenizer, token: int, found: Logprob) -> TopLogprob:
    """``bytes`` is None for a token that is a part of a character."""
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
