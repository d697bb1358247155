"""Where a text ends: end tokens, stop tokens, stop strings that are one token, the length, and the thinking budget."""

from __future__ import annotations

from typing import Any

import pytest

from trimode import SamplingParams
from trimode.runtime.decoding.ending import Ending, Forced
from trimode.runtime.decoding.thinking_budget import ThinkingBudget, ThinkingIds

END, STOP, MARK, THINK, END_THINK = 11, 20, 21, 12, 13
IDS = ThinkingIds(THINK, END_THINK)


def ending(budget: ThinkingBudget | None = None, **options: Any) -> Ending:
    params = SamplingParams(**{"max_tokens": 4, "stop_token_ids": [STOP]} | options)
    return Ending(params, frozenset({END}), {MARK: "<mark>"}, budget=budget)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("token", "reason"), [(END, None), (STOP, STOP), (MARK, "<mark>")])
def test_a_token_that_ends_the_text(token: int, reason: int | str | None, include: bool) -> None:
    """The end token is silent anyway; a stop token is hidden unless the request wants it."""
    found = ending(include_stop_str_in_output=include)
    found.take(300)
    assert (found.finish_reason, found.remaining, found.hides_last) == (None, 3, False)
    assert token in found.end_ids
    found.take(token)
    assert (found.finish_reason, found.stop_reason) == ("stop", reason)
    assert found.hides_last == (token != END and not include)


def test_the_last_token_of_the_length_may_end_the_text_itself() -> None:
    for last, finish_reason in ((300, "length"), (END, "stop")):
        found = ending(max_tokens=2)
        found.take(300)
        assert found.finish_reason is None
        found.take(last)
        assert (found.finish_reason, found.remaining) == (finish_reason, 0)


def test_an_ignored_end_token_leaves_the_requests_own_stop_tokens() -> None:
    found = ending(ignore_eos=True)
    assert [token in found.end_ids for token in (END, STOP, MARK)] == [False, True, True]
    found.take(END)
    assert found.finish_reason is None


def test_without_a_stop_string_of_many_tokens_it_feeds_no_text() -> None:
    assert not ending().feeds_text


def test_the_budget_forces_the_end_of_thinking_once() -> None:
    found = ending(ThinkingBudget(2, IDS, [THINK]), max_tokens=9)
    assert found.forced_among([300]) == []
    assert found.forced_among([300, 301, 302, 303]) == [Forced(2, END_THINK)]
    assert found.forced_among([300, END_THINK, THINK, 301, 302, 303]) == [Forced(5, END_THINK)]
    assert found.forced_among([300, 301, 302, THINK, 303, 304, 305]) == [Forced(2, END_THINK), Forced(6, END_THINK)]
    for token in (300, 301):
        assert found.forced is None
        found.take(token)
    assert found.forced == END_THINK
    assert found.forced_among([302]) == [Forced(0, END_THINK)]
    found.take(END_THINK)
    assert found.forced is None
    assert found.forced_among([302, 303, 304]) == []
    assert ending().forced is None
    assert ending().forced_among([300]) == []


@pytest.mark.parametrize(
    ("prompt", "thinking", "is_open"),
    [
        ([THINK, 300], None, True),
        ([THINK, 300, END_THINK], None, False),
        ([END_THINK, 300, THINK], None, True),
        ([300], None, False),
        ([], None, False),
        ([THINK], False, False),  # the caller knows better than the marks
        ([END_THINK], True, True),
    ],
)
def test_whether_a_prompt_leaves_a_thought_open(prompt: list[int], thinking: bool | None, is_open: bool) -> None:
    assert IDS.leave_open(prompt, thinking) == is_open
    budget = ThinkingBudget(0, IDS, prompt, thinking)
    assert budget.spent == is_open
    budget.take(THINK)
    assert budget.spent


def test_a_thought_that_begins_anew_has_the_whole_budget() -> None:
    budget = ThinkingBudget(2, IDS, [THINK])
    for token in (300, 301, END_THINK, 302, THINK):
        budget.take(token)
    assert not budget.spent
    assert budget.ends_among([300, 301, 302]) == [2]
    budget.take(300)
    budget.take(301)
    assert budget.spent


@pytest.mark.parametrize(("begin", "end"), [(None, 1), (1, None), (None, None)])
def test_a_vocabulary_with_one_mark_has_no_thinking(begin: int | None, end: int | None) -> None:
    class Tokenizer:
        def token_id(self, text: str) -> int | None:
            return {"<think>": begin, "</think>": end}[text]

    assert ThinkingIds.find(Tokenizer()) is None  # type: ignore[arg-type]
