"""Prompt lookup beside all other features of a request: the answers are AR's, whatever is copied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimode import LLM, CompletionOutput, GuidedDecodingParams, SamplingParams
from trimode.runtime.decoding.acceptance_rates import Acceptance
from trimode.runtime.decoding.lookup import LONG_MATCH, Lookup, LookupAcceptance, SharedLookupAcceptance
from trimode.runtime.scheduling.auto_block import Opening, Plan

QUESTION = {"role": "user", "content": "Make a JSON object: Oskar, football, Berlin, age 84."}
ANSWER = {"role": "assistant", "content": '{"name": "Oskar", "age": 84, "city": "Berlin", "hobby": "football"}'}
CHAT = [QUESTION, ANSWER, QUESTION]
TEXT = {"type": "string"}
PERSON = {"type": "object", "properties": {"name": TEXT, "age": {"type": "integer"}, "city": TEXT, "hobby": TEXT}}
PERSON |= {"required": ["name", "age", "city", "hobby"], "additionalProperties": False}
FEATURES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"guided_decoding": GuidedDecodingParams(json=PERSON)},
    {"guided_decoding": GuidedDecodingParams(regex=r'(\{"name": "[A-Z][a-z]+", "age": [0-9]+\} ?){2,4}')},
    {"logit_bias": {300: 4.0, 301: -3.0}, "min_tokens": 20},
    {"bad": ["city"], "stop": ["hobby"]},
    {"repetition_penalty": 1.1, "frequency_penalty": 0.1},
    {"logprobs": 2, "ignore_eos": True},
    {"max_thinking_tokens": 5, "ignore_eos": True},
    {"logits_processor": lambda _tokens, _candidates, logits: -logits, "ignore_eos": True},
]


@pytest.fixture(scope="module")
def llm(tiny_engine: Path) -> Iterator[LLM]:
    """Copies wherever it can."""
    with LLM(tiny_engine, max_batch_size=4, measure_passes=False) as llm:

        def copy(opening: list[Opening], _others: list[Any], _prefilling: bool) -> Plan:
            return Plan(8, 8, [bool(each.copy_yields) for each in opening])

        llm._scheduler._block_chooser.choose = copy  # type: ignore[method-assign,assignment]
        yield llm


def answers(llm: LLM, mode: dict[str, Any]) -> list[CompletionOutput]:
    """One answer with each feature, in batches of four, where prompts share their rows. With a thinking budget, the
    prompt ends inside a thought.
    """
    params = [SamplingParams(max_tokens=40, **mode, **feature) for feature in FEATURES]
    ids = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(CHAT))
    inputs = [{"prompt_token_ids": ids, "thinking": "max_thinking_tokens" in feature} for feature in FEATURES]
    return [output.outputs[0] for output in llm.generate(inputs, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def ar_answers(llm: LLM) -> list[CompletionOutput]:
    return answers(llm, {"mode": "ar"})


@pytest.mark.parametrize(
    "mode",
    [
        {"mode": "linear_spec", "block_length": 12, "lookup": True},
        {"mode": "auto", "lookup": True},
        {"mode": "linear_spec", "block_length": 12, "lookup": True, "tree_width": 20},
    ],
    ids=str,
)
def test_every_feature_gives_ars_answer(llm: LLM, ar_answers: list[CompletionOutput], mode: dict[str, Any]) -> None:
    copied = accepted = 0
    assert "forced" in ar_answers[-2].origins
    for feature, found, expected in zip(FEATURES, answers(llm, mode), ar_answers, strict=True):
        assert found.token_ids == expected.token_ids, feature
        assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
        if expected.logprobs is not None and found.logprobs is not None:
            for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
                assert {token: entry.logprob for token, entry in ours.items()} == pytest.approx(
                    {token: entry.logprob for token, entry in theirs.items()}, abs=1e-4
                )
        copied += found.counts.copied
        accepted += found.counts.accepted_copies
    assert 0 < accepted < copied


def test_copies_follow_what_the_grammar_forces(llm: LLM) -> None:
    """A grammar forces the keys of an object; between them, values are copied. Both save the draft pass."""
    params = SamplingParams(max_tokens=60, mode="linear_spec", lookup=True, **FEATURES[2])
    counts = llm.generate(CHAT, params).outputs[0].counts
    assert counts.lookups > 0
    assert counts.draft < counts.cycles


def test_copies_behind_a_long_match_are_assumed_to_be_better() -> None:
    """A match of 8 tokens is long."""
    known = SharedLookupAcceptance()
    assert (known.short.rates[0], known.long.rates[0]) == pytest.approx((0.5, 0.8))
    own = known.of_new_answer()
    text = list(range(1, 20))
    for length, acceptance in ((7, own.short), (8, own.long)):
        lookup = Lookup(text, own)
        lookup.find(range(1, 1 + length), 3)
        assert lookup.yields() == acceptance.yields()[:4]
    lookup.find([400, 401, 402], 3)
    assert lookup.proposal == []


def test_acceptance_is_learnt_apart_for_long_and_for_short_matches() -> None:
    known = SharedLookupAcceptance()
    own = known.of_new_answer()
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], own)
    short, long = own.short.rates.copy(), own.long.rates.copy()
    lookup.find([1, 2, 3], 4)
    assert lookup.proposal == [4, 5, 6, 7]
    assert len(lookup.yields()) == 5
    lookup.observe([4, 5, 0], ended=False)
    assert (own.short.rates[1] > short[1], own.short.rates[2] < short[2], own.short.rates[3] == short[3]) == (True,) * 3
    lookup.find(range(1, 1 + LONG_MATCH), 2)
    lookup.observe([9], ended=False)
    assert own.long.rates[0] > long[0]
    assert own.long.rates[1:] == long[1:]
    assert known.short.rates != SharedLookupAcceptance().short.rates


def test_the_tokens_that_came_say_how_many_copies_were_right() -> None:
    """Copies behind the last token that came, and none where nothing came, are not compared."""
    for emitted, ended, counted in (
        ([4, 5, 9, 7], False, [(2, 3, False)]),
        ([4, 5], True, [(2, 2, True)]),
        ([4, 5, 6, 7, 8, 9], False, [(4, 4, False)]),
        ([9], False, [(0, 1, False)]),
        ([], True, []),
    ):
        lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8], LookupAcceptance(Acceptance(), Acceptance()))
        lookup.find([1, 2, 3], 4)
        found: list[tuple[int, int, bool]] = []
        lookup._of_proposal.observe = lambda *cycle, found=found: found.append(cycle)  # type: ignore[method-assign]
        lookup.observe(emitted, ended)
        assert found == counted


def test_a_proposal_is_compared_once() -> None:
    lookup = Lookup([1, 2, 3, 4], LookupAcceptance(Acceptance(), Acceptance()))
    lookup.find([1, 2, 3], 1)
    lookup.observe([4], ended=False)
    rates = lookup.yields()
    lookup.observe([5], ended=False)
    assert (lookup.proposal, lookup.yields()) == ([], rates)
