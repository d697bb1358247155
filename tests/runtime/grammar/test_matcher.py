"""A matcher that takes, undoes and takes again equals a new one that has taken the same tokens one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trimode import GuidedDecodingParams
from trimode.model.tokenizer import Tokenizer
from trimode.runtime.grammar.compiler import CompiledGrammar, GrammarCompiler
from trimode.runtime.grammar.matcher import GrammarMatcher

VOCABULARY, END = 768, 11
GRAMMARS = (
    {"regex": "(ab|ac)*the name is (Anna|Bob)[.!]?"},
    {"regex": "x{0,3}(<[0-9]+>)?"},
    {"json": {"type": "object", "properties": {"a": {"enum": [1, "b", None]}, "c": {"type": "integer"}}}},
    {"grammar": 'start: <|im_start|> /[a-c]+/ <SPECIAL_14> "abc"'},
    {"grammar": 'start: "the name" <|im_end|> "is" /[a-c]+/'},  # has an end token in its middle
)


@pytest.fixture(scope="module")
def compiler(tiny_checkpoint: Path) -> GrammarCompiler:
    return GrammarCompiler(Tokenizer.from_folder(tiny_checkpoint), VOCABULARY, [END])


@pytest.fixture(scope="module", params=GRAMMARS, ids=lambda grammar: "-".join(grammar))
def compiled(request: pytest.FixtureRequest, compiler: GrammarCompiler) -> CompiledGrammar:
    return compiler.compile(GuidedDecodingParams(**request.param))


def after(compiled: CompiledGrammar, tokens: list[int]) -> GrammarMatcher:
    matcher = compiled.matcher()
    for token in tokens:
        assert matcher.take(token)
    return matcher


def legal(matcher: GrammarMatcher) -> list[int]:
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist()


def drawn(matcher: GrammarMatcher, draw: np.random.Generator, count: int) -> list[int]:
    """At most ``count`` tokens that may come next, and sometimes an illegal one after them."""
    tokens: list[int] = []
    while len(tokens) < count and (found := legal(matcher)):
        tokens.append(int(draw.choice(found)))
        assert matcher.take(tokens[-1])
    return tokens if draw.random() < 0.7 else [*tokens, int(draw.integers(VOCABULARY))]


@pytest.mark.parametrize("seed", range(4))
def test_a_walk_with_undone_tokens(compiled: CompiledGrammar, seed: int) -> None:
    draw = np.random.default_rng(seed)
    matcher, path, undone = compiled.matcher(), list[int](), list[int]()
    for _ in range(30):
        tokens = undone if draw.random() < 0.3 else drawn(after(compiled, path), draw, int(draw.integers(1, 6)))
        single = draw.random() < 0.5
        taken = matcher.take_all(tokens) if not single else int(bool(tokens) and matcher.take(tokens[0]))
        for token in tokens[:taken]:
            assert after(compiled, path).take(token)
            path.append(token)
        if taken < len(tokens) and not single:
            assert not after(compiled, path).take(tokens[taken])
        new = after(compiled, path)
        checks = [
            lambda each: each.forced_token,
            lambda each: (forced := each.take_forced(9), each.undo(len(forced))),
            lambda each: (each.ended, each.complete),
            legal,
            lambda each: [each.allows(token) for token in (0, END, *range(70, 90), 200, VOCABULARY - 1)],
        ]
        for place in draw.permutation(len(checks))[: draw.integers(len(checks) + 1)]:
            assert checks[place](matcher) == checks[place](new)
        if draw.random() < 0.5:
            count = int(draw.integers(len(path) + 1))
            matcher.undo(count)
            path, undone = path[: len(path) - count], path[len(path) - count :]


def test_the_first_legal_one_of_some_tokens(compiled: CompiledGrammar) -> None:
    matcher, draw = compiled.matcher(), np.random.default_rng(0)
    for _ in range(20):
        found = legal(matcher)
        tokens = draw.permutation([*found[:2], *range(500, 504), END, VOCABULARY]).tolist()
        first = next((index for index, token in enumerate(tokens) if token in found), None)
        assert matcher.first_legal(tokens) == first
        if not found:
            break
        assert matcher.take(found[int(draw.integers(len(found)))])


def test_masks_are_read_only(compiled: CompiledGrammar) -> None:
    with pytest.raises(ValueError, match="read-only"):
        compiled.matcher().mask()[0] = 0


def test_forced_tokens_can_be_taken_at_once(compiled: CompiledGrammar) -> None:
    matcher = compiled.matcher()
    for _ in range(20):
        forced = matcher.take_forced(100)
        assert matcher.forced_token is None
        found = legal(matcher)
        if not found:
            break
        matcher.undo(len(forced))
        assert [matcher.take(token) for token in forced] == [True] * len(forced)
        assert legal(matcher) == found
        assert matcher.take(found[-1])
