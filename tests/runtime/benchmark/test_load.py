"""How requests arrive, and the figures of their answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from trimode.common.errors import TriModeError
from trimode.runtime.benchmark.load import Load, Measured, measure
from trimode.runtime.benchmark.prompts import BenchmarkPrompt
from trimode.runtime.benchmark.settings import settings_of
from trimode.runtime.benchmark.summary import Percentiles, Point
from trimode.runtime.benchmark.targets import Answered
from trimode.runtime.request.outputs import CompletionOutput, Counts

PROMPTS: list[BenchmarkPrompt] = [str(number) for number in range(12)]
ONE = Answered(tokens=5, prompt_tokens=3, first=0.1, seconds=0.5, gaps=[0.1, 0.3])


class CountingTarget:
    """Answers after one more turn of the event loop than the prompt says. together: requests that must run at once."""

    def __init__(self, together: int = 0) -> None:
        self.asked: Counter[str] = Counter()
        self.running = self.most = 0
        self._together = together

    async def answer(self, prompt: BenchmarkPrompt, fields: dict[str, Any]) -> Answered:
        assert isinstance(prompt, str)
        self.asked[prompt] += 1
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(int(prompt) + 1):
            await asyncio.sleep(0)
        while self.most < self._together:
            await asyncio.sleep(0.001)
        self.running -= 1
        if prompt in fields.get("fail", ()):
            raise TriModeError(f"{prompt} failed")
        return ONE


@pytest.mark.parametrize("clients", [1, 3, 12, 20])
def test_as_many_requests_run_at_once_as_the_load_says(clients: int) -> None:
    target = CountingTarget()
    found = measure(target, PROMPTS, {}, Load(concurrency=clients))
    assert target.most == min(clients, len(PROMPTS))
    assert target.asked == Counter(PROMPTS)
    assert len(found.answers) == 12


def test_requests_of_a_rate_do_not_wait_for_each_other() -> None:
    target = CountingTarget(together=12)
    assert len(measure(target, PROMPTS, {}, Load(rate=2000.0)).answers) == 12
    assert target.asked == Counter(PROMPTS)


def test_failures_are_counted() -> None:
    found = measure(CountingTarget(), PROMPTS, {"fail": {"3", "4"}}, Load(concurrency=4))
    assert sorted(map(str, found.failures)) == ["3 failed", "4 failed"]
    assert Point.of("ar", Load(4), found).failed == 2
    with pytest.raises(TriModeError, match="0 failed"):
        measure(CountingTarget(), PROMPTS[:1], {"fail": {"0"}}, Load(concurrency=1))


def test_the_figures_of_a_point() -> None:
    output = CompletionOutput(0, token_ids=[1] * 5, counts=Counts(prefill=1, draft=1, commit=1, cycles=1))
    other = CompletionOutput(0, token_ids=[1] * 9, counts=Counts(prefill=2, draft=2, commit=4, cycles=4))
    answers = [ONE._replace(output=output), Answered(9, 4, 0.3, 0.7, [0.2], other), Answered(1, 1, 0.2, 0.2, [], None)]
    found = Point.of("linear_spec 8", Load(concurrency=2), Measured(answers, [], seconds=2.0))
    assert (found.requests, found.failed, found.tokens, found.prompt_tokens) == (3, 0, 15, 8)
    assert (found.tokens_per_second, found.requests_per_second) == (7.5, 1.5)
    assert found.first_token == pytest.approx((200, 200, 280, 298))
    assert found.per_token == pytest.approx((75, 75, 95, 99.5))
    assert found.between_updates == pytest.approx((200, 200, 280, 298))
    assert found.answer == pytest.approx((1400 / 3, 500, 660, 696))
    assert (found.tokens_per_pass, found.tokens_per_cycle) == (12 / 8, 12 / 5)


def test_a_server_reports_no_passes() -> None:
    found = Point.of("default", Load(rate=2.0), Measured([ONE._replace(tokens=1, gaps=[])], [], 1.0))
    assert (found.tokens_per_pass, found.per_token, found.between_updates) == (None, None, None)
    assert str(found.load) == "2/s"
    assert Percentiles.of([]) is None


def test_the_settings_of_modes_and_block_lengths() -> None:
    found = settings_of(["ar", "linear_spec", "auto"], [8, 16])
    assert [setting.name for setting in found] == ["ar", "linear_spec 8", "linear_spec 16", "auto"]
    assert found[2].fields == {"mode": "linear_spec", "block_length": 16}
    assert settings_of(["diffusion"], []) == [("diffusion", {"mode": "diffusion"})]
