"""What a request becomes: its limits at their borders, and the parts of its sequences. Nothing is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimode import LLM, GuidedDecodingParams, SamplingParams
from trimode.common.errors import TriModeError
from trimode.runtime.api.inputs import Prompt
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.request.errors import ContextLengthError
from trimode.runtime.scheduling.running_request import Request

THINK, END_THINK = 12, 13
REGEX = GuidedDecodingParams(regex="[0-9]+")


@pytest.fixture(scope="module")
def llm(random_engine: Path) -> Iterator[LLM]:
    with LLM(random_engine, max_batch_size=2, max_queue_size=3, update_seconds=0.25, measure_passes=False) as llm:
        yield llm


def made(llm: LLM, prompt: list[int], thinking: bool | None = None, streaming: bool = False, **options: Any) -> Any:
    """The requests of a prompt."""
    given = Prompt(None, prompt, thinking)
    params = llm._factory.resolve(given, SamplingParams(**{"max_tokens": 9} | options))
    return llm._factory.requests(4, given, params, lambda _: None, streaming)


def sequence(llm: LLM, prompt: list[int], **options: Any) -> Sequence:
    first: Request = made(llm, prompt, **options)[0]
    return first.sequence


def test_prompt_and_answer_may_fill_the_context(llm: LLM) -> None:
    made(llm, [300] * 8190, max_tokens=2)
    made(llm, [300] * 8191, max_tokens=None)
    for tokens, max_tokens, message in (
        (8190, 3, "max_tokens can be at most 2$"),
        (8191, 2, "max_tokens can be at most 1$"),
        (8192, 1, "leave no room for an answer in the context of 8192 tokens; shorten it"),
    ):
        with pytest.raises(ContextLengthError, match=message):
            made(llm, [300] * tokens, max_tokens=max_tokens)


def test_a_context_that_memory_or_a_limit_shortens_says_so(random_engine: Path) -> None:
    with LLM(random_engine, max_seq_len=50, measure_passes=False) as llm:
        made(llm, [300] * 40, max_tokens=10)
        with pytest.raises(ContextLengthError, match=r"of 50 tokens \(the engine's 8192 need more kv_cache_bytes"):
            made(llm, [300] * 40, max_tokens=11)


@pytest.mark.parametrize("field", ["top_k", "logprobs", "prompt_logprobs"])
def test_as_many_candidates_as_the_engine_reports(llm: LLM, field: str) -> None:
    made(llm, [300], **{field: 768})
    with pytest.raises(TriModeError, match=f"{field} is 769, but the engine reports 768"):
        made(llm, [300], **{field: 769})


def test_as_many_answers_as_may_run_or_wait(llm: LLM) -> None:
    assert len(made(llm, [300], n=5, temperature=1.0)) == 5
    with pytest.raises(TriModeError, match="n is 6, but at most 5 answers"):
        made(llm, [300], n=6, temperature=1.0)


def test_answers_have_seeds_one_after_the_other_and_wait_for_the_first(llm: LLM) -> None:
    """A seed may be the largest one."""
    for seed in (7, 2**64 - 2):
        requests = made(llm, [300], n=3, temperature=1.0, seed=seed, prompt_logprobs=0)
        first, second, third = requests
        assert first.siblings == [second, third]
        assert second.siblings == third.siblings == []
        assert [request.index for request in requests] == [0, 1, 2]
        assert {request.request_id for request in requests} == {4}
        drawn = [request.sequence._sampler._numbers.at([5])[0] for request in requests]
        alone = [
            sequence(llm, [300], temperature=1.0, seed=(seed + more) % 2**64)._sampler._numbers.at([5])[0]
            for more in range(3)
        ]
        assert drawn == alone
        assert [request.sequence.prompt_logprobs for request in requests] == [[None], None, None]


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    seeds = {sequence(llm, [300], temperature=1.0)._sampler._numbers._seed for _ in range(4)}
    assert len(seeds) == 4


def test_a_stream_has_the_engines_update_time(llm: LLM) -> None:
    assert made(llm, [300], streaming=True)[0]._update_seconds == 0.25
    assert made(llm, [300])[0]._update_seconds is None


def test_only_what_a_request_asks_for_is_made(llm: LLM) -> None:
    plain = sequence(llm, [300])
    assert (plain._rules, plain._biases, plain._lookup) == (None, None, None)
    assert sequence(llm, [300], lookup=True)._lookup is not None
    biased = sequence(llm, [300], logit_bias={300: 1.5})
    assert biased._biases is not None
    assert biased._rules is not None
    assert sequence(llm, [300], min_tokens=2)._biases is None
    assert plain.acceptance.rates[0] == pytest.approx(0.8)
    assert plain._kept._acceptance.rates[0] == pytest.approx(0.5)


def test_end_tokens_and_stop_tokens_do_not_come_before_the_least_length(llm: LLM) -> None:
    rules = sequence(llm, [300], min_tokens=1, stop_token_ids=[301], bad_token_ids=[302])._rules
    assert rules is not None
    assert [rules.allows(token) for token in (11, 301, 302, 303)] == [False, False, False, True]
    rules.take(303)
    assert [rules.allows(token) for token in (11, 301, 302, 303)] == [True, True, False, True]
    allowed = sequence(llm, [300], allowed_token_ids=[301, 11])._rules
    assert allowed is not None
    assert [allowed.allows(token) for token in (301, 302, 11)] == [True, False, True]


@pytest.mark.parametrize(
    ("prompt", "thinking", "in_thought"),
    [([THINK], None, True), ([THINK, END_THINK], None, False), ([300], None, False), ([300], True, True)],
)
def test_a_grammar_waits_for_the_end_of_an_open_thought(
    llm: LLM, prompt: list[int], thinking: bool | None, in_thought: bool
) -> None:
    letter = llm.tokenizer.encode("a")[-1]
    rules = made(llm, prompt, thinking, guided_decoding=REGEX)[0].sequence._rules
    assert rules.allows(letter) == in_thought
    # Without a grammar, nothing waits: the least length counts from the first token.
    free = made(llm, prompt, thinking, min_tokens=1)[0].sequence._rules
    free.take(letter)
    assert free.allows(11)


@pytest.mark.parametrize(("skip", "text_is_fed"), [(True, False), (False, True)])
def test_a_stop_string_that_is_a_special_token_is_found_by_its_id(llm: LLM, skip: bool, text_is_fed: bool) -> None:
    special = "<|im_end|>"
    found = sequence(llm, [300], stop=special, skip_special_tokens=skip, ignore_eos=True).ending
    assert found.feeds_text == text_is_fed
    assert (llm.tokenizer.special_tokens[special] in found.end_ids) == skip
    both = sequence(llm, [300], stop=[special, "abc"], skip_special_tokens=skip).ending
    assert both.feeds_text
    assert not sequence(llm, [300]).ending.feeds_text


def test_a_part_of_a_special_token_may_be_a_stop_string(llm: LLM) -> None:
    assert sequence(llm, [300], stop="im_end").ending.feeds_text
    assert sequence(llm, [300], stop="a<|im_end|>", skip_special_tokens=False).ending.feeds_text


def test_a_thinking_budget_begins_in_the_prompts_thought(llm: LLM) -> None:
    for prompt, forced in (([THINK], 13), ([300], None)):
        assert sequence(llm, prompt, max_thinking_tokens=0).ending.forced == forced
    assert sequence(llm, [THINK]).ending.forced is None


def test_a_request_starts_from_rates_that_are_probabilities(llm: LLM) -> None:
    """Kept candidates and copies after a short match are first assumed to be worse than drafts."""
    found = sequence(llm, [300], lookup=True, guided_decoding=REGEX)
    assert found._lookup is not None
    draft = found.acceptance.rates[0]
    for other in (found._kept._acceptance.rates[0], found._lookup._acceptance.short.rates[0]):
        assert 0 < other < draft < 1
    assert draft <= found._lookup._acceptance.long.rates[0] < 1
