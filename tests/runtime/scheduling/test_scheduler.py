"""Many requests at once, in a language with a known distribution: each gets its own text, whatever runs beside it.

The executor of these tests computes from the KV pool's rows (tests/support/exact_law.py), so a row of another sequence
that is read or overwritten shows in the text.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.exact_law import (
    MASK,
    Bench,
    PreparingExactLawExecutor,
    SpeculatingExactLawExecutor,
    greedy_text,
    law,
    prompts,
    text_law,
    total_variation,
)
from trimode import SamplingParams
from trimode.runtime.request.outputs import Update
from trimode.runtime.scheduling.running_request import Request

DIFFUSION = {"mode": "diffusion", "block_length": 5, "threshold": 0.5}
GREEDY_MODES: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 4},
    {"mode": "linear_spec", "block_length": 9, "draft_threshold": 0.6},
    {"mode": "auto", "block_length": 8},
]


class Recorder(Bench):
    """Records the results of its requests, by their number."""

    def __init__(self, *options: Any, **more: Any) -> None:
        super().__init__(*options, **more)
        self.texts: dict[int, list[int]] = {}
        self.updates: dict[int, list[Update]] = {}
        self.finished: dict[int, Update] = {}
        self.requests: dict[int, Request] = {}

    def submit(
        self, prompt: tuple[int, ...], params: SamplingParams, seed: int = 0, update_seconds: float | None = None
    ) -> int:
        number = len(self.requests)
        self.texts[number], self.updates[number] = [], []

        def listen(update: Update) -> None:
            assert number not in self.finished, "an update after the last"
            self.texts[number] += update.token_ids
            self.updates[number].append(update)
            if update.finish_reason or update.error:
                self.finished[number] = update

        self.requests[number] = self.add(prompt, params, listen, seed, update_seconds)
        return number


def joined(updates: list[Update], field: str) -> list[Any]:
    return [item for update in updates for item in getattr(update, field)]


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_greedy_texts_in_mixed_batches_are_those_of_the_law(batch: int) -> None:
    bench = Recorder(max_batch=batch)
    expected = {}
    for index, prompt in enumerate(prompts(60, seed=batch)):
        params = SamplingParams(max_tokens=3 + index % 20, **GREEDY_MODES[index % 4])
        expected[bench.submit(prompt, params)] = greedy_text(prompt, params.max_tokens)
    bench.run()
    assert bench.texts == expected
    assert bench.executor.pool.active == 0


def test_diffusion_in_a_batch_is_diffusion_alone() -> None:
    """Rows with different numbers of denoise passes do not stop or disturb one another, nor does padding."""
    asked = prompts(24, seed=3)
    blocks = [
        {"mode": "diffusion", "block_length": 3 + index % 5, "threshold": 0.5} if index % 3 else GREEDY_MODES[1]
        for index in range(len(asked))
    ]
    params = [SamplingParams(max_tokens=9 + index % 7, **block) for index, block in enumerate(blocks)]
    together = Recorder(max_batch=8)
    for prompt, one in zip(asked, params, strict=True):
        together.submit(prompt, one)
    together.run()
    for index, prompt in enumerate(asked):
        if params[index].mode == "diffusion":
            assert together.texts[index] == alone(prompt, params[index])


def test_updates_may_be_delayed_except_the_first_and_the_last() -> None:
    """A delayed update comes with the next one, rejected drafts included."""
    params = SamplingParams(max_tokens=40, mode="linear_spec", block_length=6, ignore_eos=True)
    sent = {}
    for update_seconds in (0.0, 1e9, None):
        bench = Recorder(max_batch=1)
        number = bench.submit((2, 3), params, update_seconds=update_seconds)
        bench.run()
        sent[update_seconds] = bench.updates[number]
    every, some, last = sent.values()
    assert (len(every) > 4, len(some), len(last)) == (True, 2, 1)
    assert some[0].token_ids == every[0].token_ids
    for updates in (some, last):
        for field in ("token_ids", "origins", "rejected"):
            assert joined(updates, field) == joined(every, field)
        assert updates[-1].counts == every[-1].counts
    assert joined(every, "rejected")


def alone(prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
    if params.mode != "diffusion":
        return greedy_text(prompt, params.max_tokens)
    bench = Recorder(max_batch=1, prefix_cache=False)
    bench.submit(prompt, params)
    bench.run()
    return bench.texts[0]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_joins_finishes_and_cancels_in_any_order(data: st.DataObject, batch: int, seed: int) -> None:
    """Against the plain model: a dictionary of texts by the law, or of diffusion alone. Nothing leaks, and nothing is
    sent twice.
    """
    bench, rng = Recorder(max_batch=batch), np.random.default_rng(seed)
    expected: dict[int, list[int]] = {}
    cancelled: set[int] = set()
    pool = prompts(6, seed)
    for event in data.draw(st.lists(st.sampled_from(["join", "step", "step", "cancel"]), max_size=60)):
        if event == "join":
            prompt = pool[rng.integers(len(pool))] + pool[rng.integers(len(pool))]
            params = SamplingParams(max_tokens=int(rng.integers(1, 20)), **[*GREEDY_MODES, DIFFUSION][rng.integers(5)])
            number = bench.submit(prompt, params, update_seconds=(None, 0.0, 0.001)[rng.integers(3)])
            expected[number] = alone(prompt, params)
        elif event == "step":
            bench.scheduler.step()
        elif expected:
            chosen = int(rng.integers(len(expected)))
            if chosen not in bench.finished:
                bench.requests[chosen].aborted = True
                cancelled.add(chosen)
                bench.scheduler.step()  # within one cycle
                assert bench.finished[chosen].finish_reason == "cancelled"
    bench.run()
    assert bench.finished.keys() == expected.keys()
    for number, text in expected.items():
        if number in cancelled:
            assert bench.texts[number] == text[: len(bench.texts[number])]
        else:
            assert bench.texts[number] == text
    assert bench.executor.pool.active == 0
    assert bench.scheduler.stats().running == bench.scheduler.stats().waiting == 0


def test_measuring_leaves_every_slot_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a trial pass fails: a slot without a request would shift all others."""
    bench = Recorder(max_batch=4)
    bench.scheduler.measure_passes()
    assert bench.executor.pool.active == 0
    run = bench.executor.run

    def fail(step: Any) -> Any:
        run(step)
        raise RuntimeError("no memory")

    monkeypatch.setattr(bench.executor, "run", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        bench.scheduler.measure_passes()
    assert bench.executor.pool.active == 0


def test_a_request_that_gets_no_slot_is_the_only_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Recorder(max_batch=4)
    first, second = (bench.submit((2, 3), SamplingParams(mode="ar", max_tokens=5)) for _ in range(2))
    acquire, failures = bench.executor.pool.acquire, iter([MemoryError()])

    def fail_once(rows: int) -> int:
        for error in failures:
            raise error
        return acquire(rows)

    monkeypatch.setattr(bench.executor.pool, "acquire", fail_once)
    bench.run()
    assert isinstance(bench.finished[first].error, MemoryError)
    assert bench.texts[second] == greedy_text((2, 3), 5)
    assert bench.scheduler.stats().failed == 1


def test_every_request_gets_the_error_even_if_the_pool_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Recorder(max_batch=1)
    numbers = [bench.submit((2, 3), SamplingParams(mode="ar")) for _ in range(3)]
    bench.scheduler.step()

    def fail(_: int) -> int:
        raise RuntimeError("the pool")

    monkeypatch.setattr(bench.executor.pool, "release", fail)
    with pytest.raises(RuntimeError, match="the pool"):
        bench.scheduler.fail_all(ValueError("the reason"))
    assert [str(bench.finished[number].error) for number in numbers] == ["the reason"] * 3
    assert not bench.scheduler.busy


def test_a_text_may_fill_the_capacity_to_the_last_row_beside_others() -> None:
    """Padding would reach past the pool's end: such a slot has passes of its own."""
    bench = Recorder(max_batch=4, capacity=24, end=False)
    numbers = {}
    for prompt, tokens in (((2,) * 20, 4), ((3, 4), 20), ((5,) * 12, 12), ((6, 2, 3), 21)):
        params = SamplingParams(max_tokens=tokens, mode="linear_spec", block_length=16)
        numbers[bench.submit(prompt, params)] = greedy_text(prompt, tokens, end=False)
    bench.run()
    assert bench.texts == numbers


def test_prompts_share_the_rows_of_their_beginnings() -> None:
    bench = Recorder(max_batch=2, capacity=64)
    system = (2, 3, 4, 5, 6) * 8  # 40 tokens: one whole block, and a short one
    first = bench.submit((*system, 2), SamplingParams(max_tokens=4, mode="ar"))
    bench.run()
    follow_up = (*system, 2, *bench.texts[first][:3], 6, 6)
    second = bench.submit(follow_up, SamplingParams(max_tokens=4, mode="ar"))
    other = bench.submit((*system, 6), SamplingParams(max_tokens=4, mode="linear_spec", block_length=4))
    bench.run()
    assert bench.texts[second] == greedy_text(follow_up, 4)
    assert bench.texts[other] == greedy_text((*system, 6), 4)
    known = len(system) + 1 + len(bench.texts[first]) - 1
    assert bench.requests[second].sequence.counts.cached_tokens == min(known, len(follow_up) - 1)
    assert bench.requests[second].sequence.counts.prefill == 1
    assert bench.requests[other].sequence.counts.cached_tokens == 32


class Poison:
    """Makes every pass fail that contains a token, as an id outside the vocabulary does."""

    def __init__(self, bench: Recorder, token: int) -> None:
        self.failed_passes = 0
        self._run, self._token = bench.executor.run, token
        bench.executor.run = self.run  # type: ignore[method-assign]

    def run(self, step: Any) -> Any:
        found = self._run(step)  # the failing pass has written its rows
        if (step.input_ids == self._token).any():
            self.failed_passes += 1
            raise RuntimeError("index out of range")
        return found


@pytest.mark.parametrize("mode", [*GREEDY_MODES, DIFFUSION], ids=str)
def test_a_poisoned_request_among_64_ends_alone(mode: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    bench = Recorder(max_batch=64, prefill_tokens=1000)
    poison, expected = Poison(bench, token=99), {}
    for index, prompt in enumerate(prompts(63, seed=1)):
        if index == 40:
            bad = bench.submit((2, 3, 99, 4), SamplingParams(max_tokens=9, mode="ar"))
        params = SamplingParams(max_tokens=3 + index % 9, **mode)
        expected[bench.submit(prompt, params)] = alone(prompt, params)
    bench.run()
    assert str(bench.finished[bad].error) == "index out of range"
    assert bench.texts.pop(bad) == []
    assert bench.texts == expected
    assert 1 < poison.failed_passes <= 7  # halves of 64 requests
    assert bench.executor.pool.active == 0
    stats = bench.scheduler.stats()
    assert (stats.finished, stats.failed) == (63, 1)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        f"request {bad} failed: RuntimeError('index out of range')"
    ]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_an_executor_that_speculates_gives_the_same_texts(batch: int) -> None:
    """It drafts and verifies in one call where every running sequence does; other modes and prefills use passes."""
    bench = Recorder(max_batch=batch, executor=SpeculatingExactLawExecutor)
    expected = {}
    for index, prompt in enumerate(prompts(30, seed=batch)):
        mode = GREEDY_MODES[1] if index % 5 else GREEDY_MODES[index % 4]
        params = SamplingParams(max_tokens=3 + index % 20, **mode)
        expected[bench.submit(prompt, params)] = greedy_text(prompt, params.max_tokens or 0)
    bench.run()
    assert bench.texts == expected
    assert 0 < bench.executor.speculations < bench.executor.passes / 2


@pytest.mark.parametrize("capacity", [64, 32])
def test_padding_over_free_and_over_running_slots_changes_no_text(capacity: int) -> None:
    """Every pass covers all slots, except where one of them has no room for the step. Prefills, drafts and commits of
    one step overlap: each must leave the rows that the one before it has committed.
    """
    bench = Recorder(max_batch=8, capacity=capacity, end=False, executor=PreparingExactLawExecutor)
    expected, batches = {}, Counter[bool]()
    run = bench.executor.run

    def count(step: Any) -> Any:
        batches[step.batch == bench.executor.pool.slots] += 1
        return run(step)

    bench.executor.run = count  # type: ignore[method-assign]
    for index, prompt in enumerate(prompts(40, seed=4)):
        params = SamplingParams(max_tokens=3 + index % 20, **[*GREEDY_MODES, DIFFUSION][index % 5])
        number = bench.submit(prompt, params)
        if params.mode != "diffusion":
            expected[number] = greedy_text(prompt, params.max_tokens or 0, end=False)
        else:
            single = Recorder(max_batch=1, prefix_cache=False, capacity=capacity, end=False)
            single.submit(prompt, params)
            single.run()
            expected[number] = single.texts[0]
    bench.run()
    assert bench.texts == expected
    assert batches[True] > 50
    assert bool(batches[False]) == (capacity == 32)


@pytest.mark.parametrize(
    ("how", "needed"),
    [({}, 1), ({"logprobs": 3}, 3), ({"temperature": 1.0, "seed": 5}, None), ({"repetition_penalty": 1.2}, None)],
    ids=str,
)
def test_a_speculation_returns_no_more_candidates_than_the_texts_need(how: dict[str, Any], needed: int | None) -> None:
    """A draft returns one. Where two requests share a cycle, the one that needs more decides."""
    params = SamplingParams(max_tokens=20, mode="linear_spec", block_length=4, ignore_eos=True, **how)
    greedy = SamplingParams(max_tokens=20, mode="linear_spec", block_length=4, ignore_eos=True)
    bench = Recorder(max_batch=2, executor=SpeculatingExactLawExecutor)
    asked: list[tuple[int | None, int | None]] = []
    speculate = bench.executor.speculate

    def record(step: Any, top_k: int | None) -> Any:
        asked.append((step.top_k, top_k))
        return speculate(step, top_k)

    bench.executor.speculate = record  # type: ignore[method-assign]
    numbers = [bench.submit((2, 3), each, seed=5) for each in (params, greedy)]
    bench.run()
    assert asked[0] == (1, needed)
    assert set(asked) <= {(1, needed), (1, 1)}  # the greedy request may be the last one
    plain = Recorder(max_batch=2)
    for each in (params, greedy):
        plain.submit((2, 3), each, seed=5)
    plain.run()
    assert [bench.texts[number] for number in numbers] == list(plain.texts.values())


def test_a_speculation_that_fails_ends_the_requests_that_fail_alone() -> None:
    bench, expected = Recorder(max_batch=8, prefill_tokens=100, executor=SpeculatingExactLawExecutor), {}
    params = SamplingParams(max_tokens=20, mode="linear_spec", block_length=4)
    for prompt in prompts(8, seed=4):
        expected[bench.submit(prompt, params)] = greedy_text(prompt, 20)
    bad = max(expected, key=lambda number: len(expected[number]))
    speculate = bench.executor.speculate

    def fail(step: Any, top_k: int | None) -> Any:
        found = speculate(step, top_k)
        slots = range(step.first_slot, step.first_slot + step.batch)
        if any(bench.scheduler._running[slot] is bench.requests[bad] for slot in slots):
            raise RuntimeError("a speculation")
        return found

    bench.executor.speculate = fail  # type: ignore[method-assign]
    bench.run()
    assert str(bench.finished[bad].error) == "a speculation"
    assert len(bench.texts.pop(bad)) < len(expected.pop(bad))
    assert bench.texts == expected


@pytest.mark.parametrize("what", ["text", "listener", "sampling", "next_pass", "open_block"])
def test_a_failure_in_a_requests_own_code_ends_it_alone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, expected = Recorder(max_batch=8), {}

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError(what)

    for index, prompt in enumerate(prompts(12, seed=2)):
        params = SamplingParams(max_tokens=20, mode="linear_spec", block_length=4, ignore_eos=True)
        number = bench.submit(prompt, params, update_seconds=0.0)
        request = bench.requests[number]
        if index != 3:
            expected[number] = alone(prompt, params)
            continue
        bad = number
        place: Any = {"text": request._text, "listener": request, "sampling": request.sequence._sampler}
        name = {"text": "new_text", "listener": "_listener", "sampling": "by_row"}.get(what, what)
        monkeypatch.setattr(place.get(what, request.sequence), name, fail)
    bench.run()
    texts = {number: text for number, text in bench.texts.items() if number != bad}
    assert {number: text[: len(expected[number])] for number, text in texts.items()} == expected
    assert bench.scheduler.stats().failed == 1
    assert bench.executor.pool.active == 0
    if what != "listener":
        assert str(bench.finished[bad].error) == what


def test_a_pass_that_fails_once_is_repeated() -> None:
    """A fault that does not come back ends no request, unless it hits a pass of one request."""
    bench, expected = Recorder(max_batch=8), {}
    run, faults = bench.executor.run, iter([RuntimeError("a fault that does not come back")])

    def fail_once(step: Any) -> Any:
        found = run(step)
        if step.batch > 2:
            for fault in faults:
                raise fault
        return found

    bench.executor.run = fail_once  # type: ignore[method-assign]
    for prompt in prompts(8, seed=3):
        params = SamplingParams(max_tokens=9, mode="linear_spec", block_length=4)
        expected[bench.submit(prompt, params)] = greedy_text(prompt, 9)
    bench.run()
    assert next(faults, None) is None
    assert bench.texts == expected


def test_answers_to_a_failed_prompt_fail_with_it() -> None:
    bench = Recorder(max_batch=8)
    Poison(bench, token=99)
    first, second = (bench.submit((2, 99), SamplingParams(max_tokens=3, mode="ar")) for _ in range(2))
    bench.scheduler.waiting.pop()
    bench.requests[first].siblings = [bench.requests[second]]
    bench.run()
    assert all(str(bench.finished[number].error) == "index out of range" for number in (first, second))
    assert bench.scheduler.stats().failed == 2


def test_stats_are_a_snapshot() -> None:
    bench = Recorder()
    first = bench.submit((2, 3), SamplingParams(max_tokens=4, mode="ar"))
    bench.run()
    before = bench.scheduler.stats()
    kept = dataclasses.asdict(before)
    bench.submit((2, 3), SamplingParams(max_tokens=4, mode="ar"))
    bench.run()
    assert dataclasses.asdict(before) == kept
    after = bench.scheduler.stats()
    assert after.counts.commit > before.counts.commit > 0
    assert (before.finished, after.finished) == (1, 2)
    assert (before.emitted, after.emitted) == (len(bench.texts[first]), sum(map(len, bench.texts.values())))


def test_an_engine_that_fails_fails_its_requests_and_serves_the_next() -> None:
    bench = Recorder(max_batch=2)
    asked = [bench.submit((2, 3), SamplingParams(max_tokens=9, mode="ar")) for _ in range(4)]
    bench.scheduler.step()
    bench.scheduler.fail_all(RuntimeError("out of order"))
    assert all("out of order" in str(bench.finished[number].error) for number in asked)
    number = bench.submit((2, 3), SamplingParams(max_tokens=9, mode="ar"))
    bench.run()
    assert bench.texts[number] == greedy_text((2, 3), 9)


def drawn(mode: dict[str, Any], how: dict[str, Any], draws: int, length: int) -> Counter[tuple[int, ...]]:
    bench = Recorder(max_batch=16, prefix_cache=False, end=False, capacity=16)
    for seed in range(draws):
        bench.submit((2, 3), SamplingParams(max_tokens=length, **mode, **how), seed=seed)
    bench.run()
    return Counter(tuple(text) for text in bench.texts.values())


LAWS = [
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("how", LAWS, ids=str)
def test_sampled_self_speculation_has_ars_law(how: dict[str, Any]) -> None:
    """Over whole texts of three tokens; `scripts/prove/runtime.py` does the same with many more draws."""
    found = drawn({"mode": "linear_spec", "block_length": 4}, how, draws=4000, length=3)
    assert total_variation(found, text_law((2, 3), 3, SamplingParams(**how))).is_chance


def test_the_test_of_the_law_can_fail() -> None:
    """A draw that the draft sways: the confidence of a draft raised in the causal row."""
    found = drawn({"mode": "linear_spec", "block_length": 4}, {"temperature": 1.1}, draws=4000, length=3)
    assert not total_variation(found, text_law((2, 3), 3, SamplingParams(temperature=1.0))).is_chance


def penalised_text(prompt: tuple[int, ...], length: int, presence: float, frequency: float) -> list[int]:
    """Greedy AR with penalties, written out."""
    text: list[int] = []
    for _ in range(length):
        logits = law((*prompt, *text), False).astype(np.float64).copy()
        logits[MASK] = -np.inf
        for token, count in Counter(text).items():
            logits[token] -= presence + frequency * count
        text.append(int(logits.argmax()))
    return text


@pytest.mark.parametrize("mode", GREEDY_MODES, ids=str)
def test_greedy_texts_with_penalties_are_those_of_the_law(mode: dict[str, Any]) -> None:
    bench, expected = Recorder(end=False), {}
    for prompt in prompts(12, seed=5):
        params = SamplingParams(max_tokens=14, presence_penalty=0.6, frequency_penalty=0.3, **mode)
        expected[bench.submit(prompt, params)] = penalised_text(prompt, 14, 0.6, 0.3)
    bench.run()
    assert bench.texts == expected
    assert list(expected.values()) != [greedy_text(prompt, 14, end=False) for prompt in prompts(12, seed=5)]


def test_penalties_count_within_a_run() -> None:
    """Sampled with penalties, one token after another: speculation draws what AR draws, seed by seed."""
    how = {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.4}
    modes = ({"mode": "ar"}, {"mode": "linear_spec", "block_length": 6}, {"mode": "auto"})
    texts = [drawn(mode, how, draws=300, length=8) for mode in modes]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != drawn({"mode": "ar"}, {"temperature": 1.0}, draws=300, length=8)
