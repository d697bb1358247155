"""The metrics of an engine, from a snapshot of its counts and from finished answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trimode.runtime.api.engine_metrics import EngineMetrics
from trimode.runtime.request.outputs import CompletionOutput, Counts
from trimode.runtime.scheduling.auto_block import Expectation
from trimode.runtime.scheduling.drafting_stats import ChoiceKey, CycleKey, CycleSums, DraftingStats
from trimode.runtime.scheduling.pass_cost import PassSeconds
from trimode.runtime.scheduling.scheduler import Stats

COUNTS = Counts(
    prefill=101,
    draft=102,
    denoise=103,
    commit=104,
    cycles=105,
    drafted=106,
    accepted=107,
    trees=108,
    lookups=109,
    copied=110,
    accepted_copies=111,
    cached_tokens=112,
)
DRAFTING = DraftingStats(
    cycles={
        CycleKey("auto", "tree", 16): CycleSums(201, 202, 203.5, 204),
        CycleKey("linear_spec", "draft", 0): CycleSums(205, 206, 207.5, 208),
    },
    choices={ChoiceKey(16, "tree", False): 209, ChoiceKey(32, "draft", True): 210},
    expectations={1: Expectation(1.0, 0.25), 16: Expectation(7.5, 0.5)},
    passes={"ar": PassSeconds(212.5, 213.5), "diffusion": PassSeconds(215.5, 216.5)},
)
STATS = Stats(
    running=1,
    waiting=2,
    slots=3,
    steps=4,
    finished=5,
    failed=6,
    emitted=7,
    counts=COUNTS,
    prefix_cache_bytes=8,
    drafting=DRAFTING,
)
SAMPLES = {
    "requests_running": 1,
    "requests_waiting": 2,
    "slots": 3,
    "steps_total": 4,
    "answers_total": 5,
    "tokens_emitted_total": 7,
    "prefix_cache_bytes": 8,
    'passes_total{kind="prefill"}': 101,
    'passes_total{kind="draft"}': 102,
    'passes_total{kind="denoise"}': 103,
    'passes_total{kind="commit"}': 104,
    "cycles_total": 105,
    "tokens_drafted_total": 106,
    "tokens_accepted_total": 107,
    "trees_total": 108,
    "lookups_total": 109,
    "tokens_copied_total": 110,
    "tokens_copied_accepted_total": 111,
    "tokens_cached_total": 112,
    'drafting_cycles_total{block="16",drafting="tree",mode="auto"}': 201,
    'drafting_tokens_verified_total{block="16",drafting="tree",mode="auto"}': 202,
    'drafting_tokens_expected_total{block="16",drafting="tree",mode="auto"}': 203.5,
    'drafting_tokens_emitted_total{block="16",drafting="tree",mode="auto"}': 204,
    'drafting_cycles_total{block="over 64",drafting="draft",mode="linear_spec"}': 205,
    'drafting_tokens_verified_total{block="over 64",drafting="draft",mode="linear_spec"}': 206,
    'drafting_tokens_expected_total{block="over 64",drafting="draft",mode="linear_spec"}': 207.5,
    'drafting_tokens_emitted_total{block="over 64",drafting="draft",mode="linear_spec"}': 208,
    'auto_choices_total{block="16",drafting="tree",reason="fastest"}': 209,
    'auto_choices_total{block="32",drafting="draft",reason="trial"}': 210,
    'auto_expected_tokens{block="1"}': 1.0,
    'auto_expected_tokens{block="16"}': 7.5,
    'auto_expected_seconds{block="1"}': 0.25,
    'auto_expected_seconds{block="16"}': 0.5,
    'pass_expected_seconds_total{attention="causal"}': 212.5,
    'pass_seconds_total{attention="causal"}': 213.5,
    'pass_expected_seconds_total{attention="bidirectional"}': 215.5,
    'pass_seconds_total{attention="bidirectional"}': 216.5,
}
SECONDS = ["0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "30.0", "60.0", "300.0"]
TOKENS = ["1.0", "8.0", "16.0", "32.0", "64.0", "128.0", "256.0", "512.0", "1024.0", "2048.0", "4096.0", "16384.0"]


@pytest.fixture
def metrics() -> EngineMetrics:
    llm: Any = SimpleNamespace(stats=lambda: STATS)
    return EngineMetrics(llm)


def values(metrics: EngineMetrics) -> dict[str, float]:
    """Samples by name and labels, without the prefix."""
    lines = [line for line in metrics.text().decode().splitlines() if not line.startswith("#")]
    return {name.removeprefix("trimode_"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_every_count_of_the_snapshot_has_its_own_metric(metrics: EngineMetrics) -> None:
    found = values(metrics)
    assert {name: found[name] for name in SAMPLES} == SAMPLES
    assert set(found) - set(SAMPLES) == {name for name in found if "answer_" in name or "time_to_" in name}


def test_answers_are_counted_by_their_times_and_lengths(metrics: EngineMetrics) -> None:
    """A cancelled answer may have no slot and no first token, and an answer in progress has no end."""
    outputs = [
        CompletionOutput(0, token_ids=[1] * 9, time_to_slot=0.0, time_to_first_token=0.03, seconds=2.0),
        CompletionOutput(1, token_ids=[1] * 3, time_to_slot=0.1, time_to_first_token=0.2),
        CompletionOutput(2, seconds=0.004),
    ]
    metrics.observe(SimpleNamespace(outputs=outputs))  # type: ignore[arg-type]
    found = values(metrics)
    for name, buckets, entries in (
        ("time_to_slot_seconds", SECONDS, [0.0, 0.1]),
        ("time_to_first_token_seconds", SECONDS, [0.03, 0.2]),
        ("answer_seconds", SECONDS, [2.0, 0.004]),
        ("answer_tokens", TOKENS, [9, 3, 0]),
    ):
        assert found[f"{name}_count"] == len(entries)
        assert found[f"{name}_sum"] == pytest.approx(sum(entries))
        for bucket in buckets:
            assert found[f'{name}_bucket{{le="{bucket}"}}'] == sum(entry <= float(bucket) for entry in entries)
        assert len([key for key in found if key.startswith(f"{name}_bucket")]) == len(buckets) + 1
