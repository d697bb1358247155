"""What the scheduler counts of its cycles and of the choices of ``auto``."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from tests.runtime.scheduling.test_scheduler import Recorder, joined
from tests.support.exact_law import ExactLawExecutor, SpeculatingExactLawExecutor
from trimode import SamplingParams
from trimode.runtime.request.outputs import Cycle
from trimode.runtime.scheduling.auto_block import Plan
from trimode.runtime.scheduling.drafting_stats import ChoiceKey, CycleKey, CycleSums, DraftingCounts

REPEATED = (2, 3, 4, 2, 3, 4, 2, 3)


@pytest.mark.parametrize(
    ("block", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (32, 32), (33, 64), (64, 64), (65, 0), (1000, 0)]
)
def test_blocks_are_counted_by_powers_of_two(block: int, bucket: int) -> None:
    counts = DraftingCounts()
    counts.count_cycles("auto", [Cycle("draft", block, block, 1.5, 1)])
    assert counts.cycles() == {CycleKey("auto", "draft", bucket): CycleSums(1, block, 1.5, 1)}


def test_cycles_are_summed_by_mode_and_source() -> None:
    counts = DraftingCounts()
    counts.count_cycles("auto", [Cycle("draft", 8, 9, 3.5, 4), Cycle("draft", 7, 7, 2.0, 1), Cycle("tree", 8, 8, 5, 6)])
    counts.count_cycles("linear_spec", [Cycle("draft", 8, 8, 3.0, 2), Cycle("draft", 8, 10, 2.5, 4)])
    counts.count_cycles("linear_spec", [Cycle("draft", 8, 12, 1.5, 1)])
    counts.count_cycles("ar", [Cycle("none", 1, 1, 1.0, 1)])
    before = counts.cycles()
    counts.count_cycles("auto", [Cycle("none", 1, 1, 1.0, 1)])
    assert before == {
        ("auto", "draft", 8): (2, 16, 5.5, 5),
        ("auto", "tree", 8): (1, 8, 5, 6),
        ("linear_spec", "draft", 8): (3, 30, 7.0, 7),
    }
    assert counts.cycles() == before | {CycleKey("auto", "none", 1): CycleSums(1, 1, 1.0, 1)}


@pytest.mark.parametrize(
    ("plan", "key"),
    [
        (Plan(1, 1, [False]), ChoiceKey(1, "none", False)),
        (Plan(2, 2, [False]), ChoiceKey(2, "draft", False)),
        (Plan(16, 16, [False]), ChoiceKey(16, "draft", False)),
        (Plan(16, 16, [False], tree=True), ChoiceKey(16, "tree", False)),
        (Plan(1, 8, [False, True]), ChoiceKey(8, "copy", False)),
        (Plan(32, 32, [False], trial=True), ChoiceKey(32, "draft", True)),
    ],
)
def test_choices_are_counted_by_what_they_run(plan: Plan, key: ChoiceKey) -> None:
    counts = DraftingCounts()
    counts.count_choice(plan)
    counts.count_choice(plan)
    assert counts.choices() == {key: 2}


def test_a_scheduler_counts_what_its_answers_report() -> None:
    bench = Recorder(max_batch=3, capacity=100, end=False)
    options: list[dict[str, Any]] = [
        {"mode": "auto"},
        {"mode": "auto", "lookup": True},
        {"mode": "linear_spec", "block_length": 6, "tree_width": 9},
        {"mode": "linear_spec", "block_length": 3},
        {"mode": "ar"},
        {"mode": "diffusion", "block_length": 4},
    ]
    numbers = {bench.submit(REPEATED, SamplingParams(max_tokens=20, **each)): each["mode"] for each in options}
    assert bench.scheduler.stats().drafting.cycles == {}
    bench.run()
    reported: Counter[tuple[str, str]] = Counter()
    emitted = 0
    for number, mode in numbers.items():
        if mode in ("auto", "linear_spec"):
            reported.update((mode, cycle.drafting) for cycle in joined(bench.updates[number], "cycles"))
            emitted += 20 - 1  # the first token is the prefill's
    drafting = bench.scheduler.stats().drafting
    counted: Counter[tuple[str, str]] = Counter()
    for key, sums in drafting.cycles.items():
        counted[key.mode, key.drafting] += sums.cycles
    assert counted == reported
    assert sum(sums.emitted for sums in drafting.cycles.values()) == emitted
    assert sum(drafting.choices.values()) > 0
    assert all(found.expected > 0 and found.seconds > 0 for found in drafting.passes.values())


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "diffusion"])
def test_fixed_modes_choose_nothing(mode: Any) -> None:
    bench = Recorder(max_batch=1, end=False)
    bench.submit(REPEATED, SamplingParams(max_tokens=9, mode=mode))
    bench.run()
    drafting = bench.scheduler.stats().drafting
    assert (drafting.choices, drafting.expectations) == ({}, {})


def test_a_search_for_copies_without_success_is_no_choice_of_auto() -> None:
    """A copy was found, and a fixed mode drafts all the same."""
    bench = Recorder(max_batch=1, end=False)
    bench.scheduler._block_chooser.choose = lambda *_: Plan(8, 8, [False])  # type: ignore[method-assign]
    bench.submit(REPEATED, SamplingParams(max_tokens=20, mode="linear_spec", lookup=True))
    bench.run()
    assert bench.scheduler.stats().drafting.choices == {}


def test_the_expectations_are_those_of_the_latest_choice() -> None:
    bench = Recorder(max_batch=1, capacity=100, end=False)
    number = bench.submit(REPEATED, SamplingParams(max_tokens=40, mode="auto", block_length=8, record_drafts=True))
    bench.run()
    found = bench.scheduler.stats().drafting.expectations
    last = joined(bench.updates[number], "cycles")[-1].record
    assert last is not None
    assert last.choice is not None
    assert {block: each.rate for block, each in found.items()} == last.choice.rates
    assert all(each.rate == each.tokens / each.seconds for each in found.values())


@pytest.mark.parametrize("plan", [Plan(4, 4, [False]), Plan(1, 1, [False]), Plan(6, 6, [False], trial=True)])
def test_a_record_has_the_block_length_that_was_chosen(plan: Plan) -> None:
    bench = Recorder(max_batch=1, capacity=100, end=False)
    bench.scheduler._block_chooser.choose = lambda *_: plan  # type: ignore[method-assign]
    number = bench.submit(REPEATED, SamplingParams(max_tokens=20, mode="auto", record_drafts=True))
    bench.run()
    choices = {cycle.record.choice[:2] for cycle in joined(bench.updates[number], "cycles")}
    assert choices == {(plan.block, plan.trial)}


def test_records_have_the_drafts_and_the_path_through_them() -> None:
    """The tokens on the paths, without the pending ones, and each cycle's last token are the answer."""
    for executor in (ExactLawExecutor, SpeculatingExactLawExecutor):
        for options in (
            {"mode": "auto"},
            {"mode": "linear_spec", "block_length": 5, "tree_width": 9},
            {"mode": "linear_spec", "block_length": 5},
            {"mode": "ar"},
        ):
            bench = Recorder(max_batch=1, capacity=100, end=False, executor=executor)
            number = bench.submit(REPEATED, SamplingParams(max_tokens=30, record_drafts=True, **options))
            bench.run()
            text = bench.texts[number]
            at = 0
            for cycle in joined(bench.updates[number], "cycles"):
                assert cycle.record is not None
                tokens, parents, path, choice = cycle.record
                assert len(tokens) == cycle.verified
                assert (parents is not None) == (cycle.drafting == "tree")
                assert (choice is not None) == (options["mode"] == "auto")
                assert [tokens[node] for node in path] == list(text[at : at + len(path)])
                for before, node in pairwise(path):
                    assert before == (node - 1 if parents is None else parents[node])
                assert cycle.emitted in (len(path), len(path) - 1)  # the latter if the last draft ends the answer
                at += cycle.emitted
            assert at == len(text) - 1


def test_without_record_drafts_cycles_have_no_record() -> None:
    bench = Recorder(max_batch=1, end=False)
    number = bench.submit(REPEATED, SamplingParams(max_tokens=9, mode="auto"))
    bench.run()
    assert {cycle.record for cycle in joined(bench.updates[number], "cycles")} == {None}
