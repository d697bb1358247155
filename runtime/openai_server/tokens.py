"""Tokens one by one, as answers tell them: their text, how they came, and how likely they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.openai_server.schema import (
    ChatLogprobs,
    CompletionLogprobs,
    Passes,
    TokenLogprob,
    TokenOrigins,
    TopLogprob,
)
from trimode.runtime.outputs import CompletionOutput, Logprob

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


def chat_logprobs(tokenizer: Tokenizer, rows: Sequence[dict[int, Logprob]], top: int) -> ChatLogprobs:
    """``top``: the number of the likeliest to list with each token."""
    content = []
    for row in rows:
        entries = {token: _entry(tokenizer, token, found) for token, found in row.items()}
        likeliest = sorted(row, key=lambda token: row[token].rank)[:top]
        chosen = entries[next(iter(row))]
        content.append(TokenLogprob(**chosen.model_dump(), top_logprobs=[entries[token] for token in likeliest]))
    return ChatLogprobs(content=content)


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
