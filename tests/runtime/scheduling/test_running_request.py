"""What one answer sends: when an update is due, what it holds, and the times of the last one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.exact_law import NoText
from trimode import SamplingParams
from trimode.runtime.decoding.acceptance_rates import Acceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.request.outputs import Cycle, Update
from trimode.runtime.scheduling import running_request
from trimode.runtime.scheduling.running_request import Request

STOP = 20


class Fed(NoText):
    """A text that is its tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def feed(self, tokens: list[int]) -> None:
        self.tokens += tokens

    def finish(self) -> str:
        return " ".join(map(str, self.tokens))


class Case:
    """One answer at a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, update_seconds: float | None = 0.0, **options: Any) -> None:
        self.now = 100.0
        monkeypatch.setattr(running_request.time, "perf_counter", lambda: self.now)
        params = SamplingParams(mode="ar", max_tokens=9, stop_token_ids=[STOP], **options)
        self.sequence = Sequence(
            [5], params, Ending(params, frozenset()), Acceptance(), context=99, mask_id=0, prefill_step=8, seed=0
        )
        self.sent: list[Update] = []
        self.text = Fed()
        text: Any = self.text
        self.request = Request(
            self.sequence, text, self.sent.append, request_id=3, index=2, update_seconds=update_seconds
        )

    def emit(self, *tokens: int) -> None:
        for token in tokens:
            self.sequence._emit([token])
            self.sequence.origins.append("bonus")

    def deliver_at(self, now: float) -> list[list[int]]:
        """The tokens of each update that is sent then."""
        self.now, before = now, len(self.sent)
        self.request.deliver()
        return [update.token_ids for update in self.sent[before:]]


def test_an_update_is_due_after_its_time_if_there_is_something_new(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, update_seconds=2.0)
    assert case.deliver_at(101) == []  # nothing new
    case.emit(300)
    assert case.deliver_at(102) == [[300]]
    case.emit(301)
    assert case.deliver_at(103.9) == []
    case.emit(302)
    assert case.deliver_at(104) == [[301, 302]]
    assert case.deliver_at(110) == []
    case.emit(303, STOP)
    assert case.deliver_at(110.5) == [[303, STOP]]
    assert {update.index for update in case.sent} == {2}


def test_a_request_that_does_not_stream_gets_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, update_seconds=None)
    for token in (300, 301):
        case.emit(token)
        assert case.deliver_at(200) == []
    case.emit(STOP)
    assert case.deliver_at(300) == [[300, 301, STOP]]


def test_the_last_update_has_the_times_since_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    case.now = 101.0
    case.request.admit()
    case.deliver_at(101.5)
    case.emit(300)
    case.deliver_at(103)
    case.emit(301)
    case.deliver_at(104)
    case.emit(STOP)
    case.deliver_at(107)
    assert [update.seconds for update in case.sent[:-1]] == [None, None]
    last = case.sent[-1]
    assert (last.time_to_slot, last.time_to_first_token, last.seconds) == (1.0, 3.0, 7.0)
    assert (last.finish_reason, last.stop_reason) == ("stop", STOP)


def test_a_request_that_is_cancelled_before_its_first_token_has_no_times_but_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(monkeypatch)
    case.now = 105.0
    case.request.cancel()
    (last,) = case.sent
    assert (last.time_to_slot, last.time_to_first_token, last.seconds) == (None, None, 5.0)
    assert last.finish_reason == "cancelled"


@pytest.mark.parametrize("include", [False, True])
def test_a_hidden_stop_token_is_no_part_of_the_text(monkeypatch: pytest.MonkeyPatch, include: bool) -> None:
    case = Case(monkeypatch, update_seconds=None, include_stop_str_in_output=include)
    case.emit(300, 301, STOP)
    case.deliver_at(101)
    assert case.sent[0].token_ids == [300, 301, STOP]
    assert case.sent[0].text == ("300 301 20" if include else "300 301")


def test_each_update_holds_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cycles, rejected drafts of all cycles since the last update, and a copy of the counts."""
    case, numbers = Case(monkeypatch, update_seconds=2.0), itertools.count()
    sequence = case.sequence

    def cycle() -> None:
        number = next(numbers)
        case.emit(300 + number)
        sequence.cycles.append(Cycle("none", 1, 1, 1.0, number))
        sequence.rejected = [number]
        sequence.counts.cycles += 1

    for now in (100, 101, 102):
        cycle()
        case.deliver_at(now)
    first, second = case.sent
    assert (first.rejected, second.rejected) == ([0], [1, 2])
    assert [each.emitted for each in first.cycles] == [0]
    assert [each.emitted for each in second.cycles] == [1, 2]
    assert (first.counts.cycles, second.counts.cycles) == (1, 3)
    assert (first.origins, second.origins) == (["bonus"], ["bonus"] * 2)


def test_prompt_logprobs_are_sent_once_when_they_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, prompt_logprobs=0)
    assert case.sequence.prompt_logprobs == [None]
    case.emit(300)
    case.deliver_at(101)
    case.sequence.committed = 1
    for token in (301, 302):
        case.emit(token)
        case.deliver_at(102)
    assert [update.prompt_logprobs for update in case.sent] == [None, [None], None]
