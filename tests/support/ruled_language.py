"""The language of :mod:`tests.support.exact_law` under a grammar, on an engine that reports 3 of its 7 tokens.

Words 2 .. 6 are the letters a .. e. The exact distribution of constrained texts is computed from the law and the legal
tokens alone: AR's 3 best legal tokens, by logit and bias.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from tests.support.exact_law import END, MASK, VOCABULARY, Bench, WeakDraftExecutor, law
from trimode import SamplingParams
from trimode.runtime.decoding.ruled_rows import Biases
from trimode.runtime.decoding.sampling import kept_weights
from trimode.runtime.decoding.token_rules import TokenRules
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep
from trimode.runtime.grammar.matcher import GrammarMatcher, Vocabulary
from trimode.runtime.request.outputs import Update

REPORTED = 3
# Five, two or three legal tokens, by the text so far; no text of three tokens may end.
EXPRESSION = "([a-c][b-d]|d[ae]|e[a-e])[abce][a-e]{1,9}"
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 1.4, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 2, "logit_bias": {3: -1.5, 6: 1.0}},
)


class FewCandidatesExecutor(WeakDraftExecutor):
    """Reports the best REPORTED tokens of each row; its drafts are often wrong."""

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        found = super().run(step)
        return found._replace(logits=found.logits[..., :REPORTED], tokens=found.tokens[..., :REPORTED])


class _Letters:
    eos_token_id, bos_token_id, special_token_ids = END, None, (MASK, END)
    tokens = (b"\xff<mask>", b"\xff<end>", b"a", b"b", b"c", b"d", b"e")

    def __call__(self, text: bytes) -> list[int]:
        return [letter - ord("a") + 2 for letter in text]


LETTERS = Vocabulary(LLTokenizer(TokenizerWrapper(_Letters())), VOCABULARY, (END,))
_GRAMMAR = LLMatcher(LETTERS.tokenizer, LLMatcher.grammar_from_regex(EXPRESSION))


def rules(grammar: LLMatcher = _GRAMMAR, **options: Any) -> TokenRules:
    return TokenRules(VOCABULARY, {END}, grammar=GrammarMatcher(grammar.deep_copy(), LETTERS), **options)


def drawn(prompt: tuple[int, ...], params: SamplingParams, seeds: range) -> Counter[tuple[int, ...]]:
    """How often each text was drawn, many at once."""
    counts = Counter[tuple[int, ...]]()
    bench = Bench(max_batch=16, capacity=32, end=False, prefix_cache=False, executor=FewCandidatesExecutor)
    biases = Biases(params.logit_bias, VOCABULARY) if params.logit_bias else None

    def receive(update: Update) -> None:
        if update.error is not None:
            raise update.error
        counts[tuple(update.token_ids)] += 1

    for seed in seeds:
        bench.add(prompt, params, receive, seed, rules=rules(), biases=biases)
    bench.run()
    return counts


def constrained_law(prompt: tuple[int, ...], length: int, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The exact probability of every text of ``length`` tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for text, probability in found.items():
            matcher = GrammarMatcher(_GRAMMAR.deep_copy(), LETTERS)
            assert all(matcher.take(token) for token in text)
            logits = law(prompt + text, end=False).copy()
            for token, bias in (params.logit_bias or {}).items():
                logits[token] += np.float32(bias)
            legal = [token for token in range(2, VOCABULARY) if matcher.mask()[0] >> token & 1]
            best = sorted(legal, key=lambda token: (-logits[token], token))[:REPORTED]
            weights = kept_weights(logits[best][None], params)[0]
            for token, weight in zip(best, weights / weights.sum(), strict=True):
                if weight:
                    longer[(*text, token)] = probability * float(weight)
        found = longer
    return found
