"""Autoregression under a grammar by the PyTorch reference, from logits over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tests.support.exact_law import after_penalties
from trimode import SamplingParams
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.runtime.grammar.compiler import CompiledGrammar


def legal_tokens(words: np.ndarray) -> np.ndarray:
    """[V] bool from a mask's words."""
    return np.unpackbits(words.view(np.uint8), bitorder="little").astype(np.bool_)


@torch.no_grad()
def masked_ar(
    reference: NemotronLabsDiffusionModel,
    prompt: Sequence[int],
    grammar: CompiledGrammar | None,
    max_tokens: int,
    end_ids: Sequence[int],
    *,
    mask_id: int,
    banned: Sequence[int] = (),
    biases: Mapping[int, float] | None = None,
    min_tokens: int = 0,
    penalties: SamplingParams | None = None,
    reported: int | None = None,
) -> list[int]:
    """The greedy tokens: the likeliest legal one after another.

    penalties: whose penalties hold; they apply to the ``reported`` best legal tokens of each row.
    """
    matcher = None if grammar is None else grammar.matcher()
    logits, cache = reference._causal_pass(torch.tensor(prompt), [])
    tokens: list[int] = []
    while True:
        row = logits[-1].float().numpy().copy()
        for token, bias in (biases or {}).items():
            row[token] += np.float32(bias)
        illegal = np.zeros(len(row), np.bool_) if matcher is None else ~legal_tokens(matcher.mask())[: len(row)]
        illegal[[mask_id, *banned]] = True
        if len(tokens) < min_tokens:
            illegal[list(end_ids)] = True
        row[illegal] = -np.inf
        if penalties is not None:
            best = np.argsort(-row, kind="stable")[:reported]
            kept = np.full(len(row), -np.inf, np.float32)
            kept[best] = after_penalties(row, tuple(prompt), tuple(tokens), penalties)[best]
            row = kept
        token = int(row.argmax())
        tokens.append(token)
        if token in end_ids or len(tokens) == max_tokens:
            return tokens
        if matcher is not None:
            assert matcher.take(token)
        logits, cache = reference._causal_pass(torch.tensor([token]), cache)
