"""Draft trees under rules: legal nodes only, the likeliest paths first, and the text of AR whatever they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from tests.runtime.decoding.test_token_rules import CHAT, Case
from tests.support.drawn_schemas import drawn_schema
from tests.support.exact_law import VOCABULARY
from tests.support.ruled_language import LETTERS, rules
from trimode import LLM, GuidedDecodingParams, SamplingParams
from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.runtime.decoding.draft_tree import DraftTree, likeliest_nodes
from trimode.runtime.decoding.ruled_tree import Drafted, legal_tree
from trimode.runtime.decoding.token_rules import TokenRules

PENDING, CLOSE = 99, 6
# Choices, forced runs, places where the text may end, and an end within reach.
EXPRESSIONS = ("[a-e]{1,20}", "a(bcd[ae]|[bc]d)[a-c]{0,3}", "(ab|ba){1,3}e?", "[ab]c{0,2}", "abcde", "[ab][a-d]{1,9}")
GRAMMARS = {
    expression: LLMatcher(LETTERS.tokenizer, LLMatcher.grammar_from_regex(expression)) for expression in EXPRESSIONS
}
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"banned": [3]}, {"min_tokens": 3}, {"thought_end": CLOSE})


@st.composite
def drafts(draw: st.DrawFn) -> Drafted:
    """Each place has some tokens of the vocabulary but the mask, in any order."""
    depth, ranks = draw(st.integers(1, 5)), draw(st.integers(1, VOCABULARY - 1))
    tokens = [draw(st.permutations(range(1, VOCABULARY)))[:ranks] for _ in range(depth)]
    falls = draw(st.lists(st.floats(0, 3), min_size=depth * ranks, max_size=depth * ranks))
    logits = -np.array(falls).reshape(depth, ranks).cumsum(axis=1)
    return Drafted(1, np.array(tokens), logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def path(tree: DraftTree, node: int) -> list[int]:
    """The tokens from the root to a node, without the root's."""
    found: list[int] = []
    while node:
        found.append(tree.ids[node])
        node = tree.parents[node]
    return found[::-1]


def fresh(expression: str, options: dict[str, Any], taken: list[int]) -> TokenRules:
    """Rules that have taken some tokens and nothing else."""
    found = rules(GRAMMARS[expression], **options)
    for token in taken:
        found.take(token)
    return found


@settings(deadline=None)
@given(st.sampled_from(EXPRESSIONS), st.sampled_from(OPTIONS), drafts(), st.integers(1, 20), st.integers(0, 6))
def test_every_node_is_legal_and_knows_what_its_path_forces(
    expression: str, options: dict[str, Any], drafted: Drafted, most: int, deepest: int
) -> None:
    used = rules(GRAMMARS[expression], **options)
    found = legal_tree(used, PENDING, drafted, most, deepest)
    tree, forced = found.walk
    assert len(tree) <= most
    assert len({tuple(path(tree, node)) for node in range(len(tree))}) == len(tree)
    for node in range(len(tree)):
        taken = path(tree, node)
        here = fresh(expression, options, taken)  # raises if the path is not legal
        assert len(taken) <= deepest
        assert (node in forced) == (not here.ended)
        if node in forced:
            assert forced[node] == here.forced_token
        if node:
            before = fresh(expression, options, taken[:-1])
            assert before.allows(taken[-1])
            assert (node in found.forced) == (before.forced_token is not None)
            assert node in found.forced or taken[-1] in drafted.tokens[len(taken) - 1]
    # The rules are where they were.
    assert used.forced_token == fresh(expression, options, []).forced_token
    np.testing.assert_array_equal(used.mask(), fresh(expression, options, []).mask())


def legal_paths(expression: str, options: dict[str, Any], drafted: Drafted, deepest: int) -> set[tuple[int, ...]]:
    """All legal paths of candidates and forced tokens."""
    found: set[tuple[int, ...]] = set()
    paths: list[tuple[int, ...]] = [()]
    while paths:
        taken = paths.pop()
        found.add(taken)
        here = fresh(expression, options, [*taken])
        if here.ended or len(taken) == deepest:
            continue
        candidates = drafted.tokens[len(taken)].tolist() if len(taken) < len(drafted.tokens) else []
        if here.forced_token is not None:
            candidates = [here.forced_token]
        paths += [(*taken, token) for token in candidates if here.allows(token)]
    return found


@settings(deadline=None)
@given(st.sampled_from(EXPRESSIONS), st.sampled_from(OPTIONS), drafts(), st.integers(1, 12))
def test_it_leaves_out_a_legal_path_only_if_it_has_no_room(
    expression: str, options: dict[str, Any], drafted: Drafted, most: int
) -> None:
    every = legal_paths(expression, options, drafted, 4)
    tree = legal_tree(rules(GRAMMARS[expression], **options), PENDING, drafted, most, 4).walk.tree
    assert len(tree) == min(most, len(every))
    assert {tuple(path(tree, node)) for node in range(len(tree))} <= every


def test_the_probability_of_illegal_candidates_goes_to_those_behind_them() -> None:
    """Behind a, 0.6 of the candidates is illegal. So the path a, b has 0.5 * 0.3 / 0.4, more than the path b."""
    tokens = np.array([[2, 3, 4], [6, 3, 4]])
    drafted = Drafted(1, tokens, np.log([[0.5, 0.35, 0.15], [0.6, 0.3, 0.1]]))
    found = legal_tree(rules(GRAMMARS["[ab][a-d]{1,9}"]), PENDING, drafted, 3, 2).walk.tree
    assert [path(found, node) for node in range(3)] == [[], [2], [2, 3]]
    free = DraftTree.of(PENDING, tokens.tolist(), likeliest_nodes(drafted.log_probs, 3))
    assert [path(free, node) for node in (1, 2, 3)] == [[2], [2, 6], [3]]


@settings(deadline=None)
@given(drafts(), st.integers(1, 20))
def test_without_an_illegal_token_it_has_the_products_of_free_text(drafted: Drafted, most: int) -> None:
    """Rounding decides between paths of equal products."""
    found = legal_tree(TokenRules(VOCABULARY, set()), PENDING, drafted, most, len(drafted.tokens)).walk.tree
    by_token = [
        dict(zip(*place, strict=True)) for place in zip(drafted.tokens.tolist(), drafted.log_probs, strict=True)
    ]
    products = [
        sum(by_token[place][token] for place, token in enumerate(path(found, node))) for node in range(1, len(found))
    ]
    expected = [-node[0] for node in likeliest_nodes(drafted.log_probs, most - 1)]
    np.testing.assert_allclose(sorted(products, reverse=True), expected, atol=1e-9)


def test_a_row_is_doubtful_where_no_likely_candidate_is_legal() -> None:
    tokens = np.array([[2, 3, 4], [4, 5, 6]])
    drafted = Drafted(1, tokens, np.log(np.tile([0.6, 0.3, 0.1], (2, 1))))
    found = legal_tree(rules(GRAMMARS["(ab|ba){1,3}e?"]), PENDING, drafted, 9, 5)
    # a and b lead on to what the grammar forces; behind "ab" and "ba" nothing was drafted.
    assert {tuple(path(found.walk.tree, node)) for node in range(len(found.walk.tree))} == {
        (), (2,), (2, 3), (3,), (3, 2)
    }  # fmt: skip
    assert found.doubtful == set()
    behind = drafted._replace(first=1, tokens=tokens[:1], log_probs=drafted.log_probs[:1])
    found = legal_tree(rules(GRAMMARS["(ab|ba){1,3}e?"]), PENDING, behind, 9, 5)
    assert [path(found.walk.tree, row) for row in sorted(found.doubtful)] == [[2, 3], [3, 2]]
    none = drafted._replace(tokens=np.array([[4, 5, 6], [4, 5, 6]]))
    found = legal_tree(rules(GRAMMARS["(ab|ba){1,3}e?"]), PENDING, none, 9, 5)
    assert (len(found.walk.tree), found.doubtful) == (1, {0})


@pytest.mark.parametrize(("rank", "doubtful"), [(0, set()), (1, set()), (7, set()), (8, {0}), (9, {0})])
def test_a_legal_candidate_of_a_low_rank_is_doubtful(rank: int, doubtful: set[int]) -> None:
    """The verifier may report none that is legal there."""
    tokens = np.arange(1, 11)[None]
    law = TokenRules(40, set(), allowed=[int(tokens[0, rank])])
    found = legal_tree(law, PENDING, Drafted(1, tokens, np.full((1, 10), np.log(0.1))), 2, 1)
    assert path(found.walk.tree, 1) == [rank + 1]
    assert found.doubtful == doubtful


@pytest.fixture(scope="module", params=["tiny", "random"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Case, int]]:
    """An engine with its candidates a row: the shipped one, and one whose drafts are hardly ever legal."""
    if request.param == "tiny":
        engine, reported = request.getfixturevalue("tiny_engine"), 64
        checkpoint = engine.parent / "w4a16"
    else:
        checkpoint, reported = request.getfixturevalue("random_checkpoint"), 4
        engine = tmp_path_factory.mktemp("engine") / "four"
        build_engine(Checkpoint(checkpoint), engine, top_k=reported)
    with LLM(engine, max_batch_size=8) as llm:
        yield Case(llm, load_reference(Checkpoint(checkpoint))), reported


TREES: tuple[dict[str, Any], ...] = (
    {"block_length": 4, "tree_width": 12},
    {"block_length": 8, "tree_width": 8, "lookup": True},
    {"block_length": 16, "tree_width": 24, "adapter": False},
)
PENALTIES: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.8, "frequency_penalty": 0.4},
)


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_trees_under_grammars_and_penalties_in_a_batch_are_exact(
    case: tuple[Case, int], penalties: dict[str, Any]
) -> None:
    """Greedy answers under different grammars, each with three kinds of trees, beside answers without rules."""
    bench, reported = case
    guideds = [
        GuidedDecodingParams(json=drawn_schema(5)),
        GuidedDecodingParams(regex="([a-z]{2,5}=[0-9]{1,3};){1,9}"),
    ]
    params = [
        SamplingParams(max_tokens=40, mode="linear_spec", guided_decoding=guided, **tree, **penalties)
        for guided in guideds
        for tree in TREES
    ]
    free = SamplingParams(max_tokens=40, mode="linear_spec", **TREES[0])
    answers = [each.outputs[0] for each in bench.llm.generate([bench.prompt] * 7, [*params, free])]
    for index, guided in enumerate(guideds):
        expected = bench.expected(40, guided, penalties=params[0], reported=reported)
        for tree, answer in zip(TREES, answers[3 * index : 3 * index + 3], strict=True):
            assert answer.token_ids == expected, (guided, tree)
            assert answer.counts.trees > 0
    assert answers[-1].token_ids == bench.expected(40)


def test_draws_with_trees_under_a_grammar_are_those_of_ar_with_the_same_seed(case: tuple[Case, int]) -> None:
    """Each alone, so that no other answer's passes change its bits."""
    llm, prompt = case[0].llm, case[0].prompt
    guided = GuidedDecodingParams(json=drawn_schema(21))
    draws: tuple[dict[str, Any], ...] = (
        {"temperature": 1.0},
        {"top_p": 0.9, "repetition_penalty": 1.2},
        {"logprobs": 2},
    )
    for seed, options in enumerate(draws):
        common: dict[str, Any] = {"max_tokens": 40, "seed": seed, "guided_decoding": guided} | options
        expected = llm.generate(prompt, SamplingParams(mode="ar", **common)).outputs[0]
        for tree in TREES:
            found = llm.generate(prompt, SamplingParams(mode="linear_spec", **tree, **common)).outputs[0]
            assert found.token_ids == expected.token_ids, (options, tree)


def test_trees_go_with_thinking_budgets_and_the_grammar_behind_them(tiny_engine: Any) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    common: dict[str, Any] = {
        "max_tokens": 60,
        "max_thinking_tokens": 12,
        "guided_decoding": GuidedDecodingParams(json=schema),
        "frequency_penalty": 0.3,
    }
    with LLM(tiny_engine, max_batch_size=4, measure_passes=False) as llm:
        params = [SamplingParams(mode="linear_spec", **tree, **common) for tree in TREES]
        found = llm.generate([CHAT] * 4, [SamplingParams(mode="ar", **common), *params], enable_thinking=True)
    expected, *answers = [each.outputs[0] for each in found]
    assert llm.tokenizer.token_id("</think>") in expected.token_ids
    for answer in answers:
        assert answer.token_ids == expected.token_ids
        assert answer.counts.trees > 0
