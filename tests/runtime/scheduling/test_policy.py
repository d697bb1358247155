"""What the scheduler decides: who runs, what a step prefills, who shares a pass, and whom ``auto`` counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.exact_law import (
    END,
    VOCABULARY,
    Bench,
    ExactLawExecutor,
    PreparingExactLawExecutor,
    SpeculatingExactLawExecutor,
)
from tests.support.ruled_language import FewCandidatesExecutor
from trimode import SamplingParams
from trimode.runtime.decoding.ruled_rows import AgainRate
from trimode.runtime.decoding.token_rules import TokenRules
from trimode.runtime.executor import BidirectionalStep, CausalStep
from trimode.runtime.request.outputs import Counts
from trimode.runtime.scheduling.auto_block import CHOICES, Opening, Plan
from trimode.runtime.scheduling.batching import Span
from trimode.runtime.scheduling.drafting_stats import ChoiceKey, DraftingStats
from trimode.runtime.scheduling.pass_cost import PassSeconds
from trimode.runtime.scheduling.running_request import Request
from trimode.runtime.scheduling.scheduler import Stats

NOTHING_DRAFTED = DraftingStats({}, {}, {}, dict.fromkeys(("ar", "diffusion"), PassSeconds(0.0, 0.0)))  # type: ignore[arg-type]
PREFILL_STEP = 4  # of the bench's sequences


class Watched(Bench):
    """Notes every pass, by the scheduler's step. Whole batches cost least."""

    def __init__(self, **options: Any) -> None:
        super().__init__(prefix_cache=False, end=False, **options)
        self.passes: list[list[Any]] = []
        run = self.executor.run

        def noting(step: Any) -> Any:
            self.passes[-1].append(step)
            return run(step)

        self.executor.run = noting  # type: ignore[method-assign]
        self.cost.seconds = lambda _engine, batch, _step: 1.0 + 1e-3 * batch  # type: ignore[method-assign]

    def submit(self, prompt: int, max_tokens: int = 50, **params: Any) -> Request:
        """A request with a prompt of so many tokens."""
        asked = SamplingParams(max_tokens=max_tokens, **{"mode": "ar"} | params)
        return self.add((2,) * prompt, asked, lambda _: None)

    def step(self) -> list[Any]:
        self.passes.append([])
        self.scheduler.step()
        return self.passes[-1]

    @property
    def running(self) -> list[Request]:
        return self.scheduler._running


@pytest.mark.parametrize("max_batch", [1, 2, 5])
def test_no_more_than_max_batch_run_and_the_first_come_first(max_batch: int) -> None:
    bench = Watched(max_batch=max_batch)
    requests = [bench.submit(1) for _ in range(max_batch + 2)]
    bench.step()
    assert bench.running == requests[:max_batch]
    assert list(bench.scheduler.waiting) == requests[max_batch:]
    requests[0].aborted = True
    bench.step()
    assert set(bench.running) == set(requests[1 : max_batch + 1])


def test_a_request_waits_until_the_kv_pool_has_rows_for_it_and_for_all_that_run() -> None:
    bench = Watched(max_batch=4, capacity=60, limit_rows=100)
    first, second, third = bench.submit(10, 40), bench.submit(10, 40), bench.submit(2, 2)
    bench.step()
    assert bench.running == [first, second]  # 50 rows each; a third slot would leave 33
    assert list(bench.scheduler.waiting) == [third]
    first.aborted = second.aborted = True
    alone = bench.submit(10, 50)
    bench.step()
    assert bench.running == [third]  # 60 rows beside it would exceed the limit
    assert list(bench.scheduler.waiting) == [alone]
    third.aborted = True
    bench.step()
    assert bench.running == [alone]


def test_a_long_sequence_leaves_its_rows_when_others_go_on() -> None:
    """Not only when the pool is empty. The rows of the others stay."""
    bench = Watched(max_batch=2, capacity=1000, prefill_tokens=10_000)
    long, short = bench.submit(601, max_tokens=1), bench.submit(9, max_tokens=200)
    bench.step()
    assert bench.running == [long, short]
    rows = []
    while long in bench.running:
        bench.step()
        rows.append(bench.executor.pool.rows)
    assert bench.running == [short]
    assert max(rows) > 600
    assert 128 < short.sequence.committed < rows[-1] < 200


@pytest.mark.parametrize(
    ("budget", "prompts", "prefilled"),
    [
        (8, [12, 12, 12], [4, 4, 0]),  # two chunks fill the budget exactly
        (7, [12, 12, 12], [4, 0, 0]),
        (1, [12, 12], [4, 0]),  # the first chunk always runs
        (8, [3, 12, 12], [3, 4, 0]),
        (9, [3, 12, 2], [3, 4, 2]),  # a short prompt fits where a long one would not
        (100, [12, 12, 12], [4, 4, 4]),
    ],
)
def test_the_prefill_budget_of_a_step(budget: int, prompts: list[int], prefilled: list[int]) -> None:
    bench = Watched(max_batch=8, prefill_tokens=budget)
    requests = [bench.submit(prompt) for prompt in prompts]
    bench.step()
    assert [request.sequence.committed for request in requests] == prefilled


@pytest.mark.parametrize(
    ("milliseconds", "chunks"),
    [(60, 1), (50, 1), (25, 2), (24, 2), (12, 4)],  # of a chunk, and how many fit into 50 ms
)
def test_more_prompts_are_prefilled_as_long_as_they_take_little_time(milliseconds: int, chunks: int) -> None:
    """Whatever the other sequences do. The sum counts, although one pass of all chunks takes less time."""
    bench = Watched(max_batch=8, prefill_tokens=PREFILL_STEP)
    decoding = bench.submit(1)
    bench.step()
    bench.cost.seconds = lambda _engine, batch, step: 1e-3 * milliseconds * batch * step / PREFILL_STEP  # type: ignore[method-assign]
    requests = [bench.submit(12) for _ in range(6)]
    bench.step()
    assert [request.sequence.committed for request in requests] == [PREFILL_STEP] * chunks + [0] * (6 - chunks)
    assert len(decoding.sequence.emitted) == 2


def test_prefills_run_beside_commits_and_do_not_stop_them() -> None:
    bench = Watched(max_batch=4, prefill_tokens=4)
    decoding = bench.submit(1)
    bench.step()
    long = bench.submit(12)
    emitted = len(decoding.sequence.emitted)
    for committed in (4, 8, 12):
        (shared,) = bench.step()
        emitted += 1
        assert len(decoding.sequence.emitted) == emitted
        assert long.sequence.committed == committed
        assert (shared.batch, shared.input_ids.shape[1]) == (2, PREFILL_STEP)


@pytest.mark.parametrize("speculating", ["linear_spec", "auto"])
def test_a_step_drafts_and_commits(speculating: str) -> None:
    bench = Watched(max_batch=2)
    bench.submit(1, mode=speculating, block_length=8)
    bench.step()
    kinds = [isinstance(step, CausalStep) for step in bench.step()]
    assert kinds in ([False, True], [True])  # auto may choose AR
    assert speculating == "auto" or kinds == [False, True]


def test_whom_auto_counts_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of fixed modes share the passes; those of ``auto`` decide together. Prefills count, too."""
    bench = Watched(max_batch=8, prefill_tokens=100)
    asked: list[tuple[list[Any], list[Any]]] = []

    def choose(opening: list[Opening], others: list[Any], _prefilling: bool) -> Plan:
        asked.append(([each.sequence for each in opening], others))
        return Plan(4, 4, [False] * len(opening))

    monkeypatch.setattr(bench.scheduler._block_chooser, "choose", choose)
    autos = [bench.submit(1, mode="auto") for _ in range(2)]
    fixed = [bench.submit(1), bench.submit(1, mode="linear_spec", block_length=3), bench.submit(1, mode="diffusion")]
    fixed.append(bench.submit(20))  # three steps of prefill
    autos.append(bench.submit(20, mode="auto"))
    bench.step()
    assert asked == []  # nobody has a first token yet
    bench.step()
    assert asked == [([each.sequence for each in autos], [each.sequence for each in fixed])]
    assert [each.sequence.counts.drafted for each in autos] == [3, 3, 0]


def test_tokens_that_another_process_has_generated_are_no_choice_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, asked = Watched(max_batch=1), 0

    def choose(opening: list[Opening], *_: Any) -> Plan:
        nonlocal asked
        asked += 1
        return Plan(1, 1, [False] * len(opening))

    monkeypatch.setattr(bench.scheduler._block_chooser, "choose", choose)
    request = bench.submit(1, mode="auto")
    request.sequence.begun = [2, 3, 4, 5]
    bench.step()
    bench.step()
    assert request.sequence.emitted[:4] == [2, 3, 4, 5]
    assert (len(request.sequence.emitted), asked) == (5, 0)
    bench.step()
    assert (len(request.sequence.emitted), asked) == (6, 1)


def test_a_failed_request_takes_part_in_nothing() -> None:
    bench = Watched(max_batch=4, prefill_tokens=100)
    failed, healthy = bench.submit(1), bench.submit(1)
    bench.step()
    failed.failure = RuntimeError("earlier in this step")
    (step,) = bench.step()
    assert step.batch == 1
    assert bench.running == [healthy]


def test_passes_span_neighbouring_slots_and_pad_those_between() -> None:
    """The middle one denoises; the outer two commit together, over its slot, without touching its committed rows."""
    bench = Watched(max_batch=4, prefill_tokens=100)
    requests = [bench.submit(1, mode=mode) for mode in ("ar", "diffusion", "ar")]
    bench.step()
    denoise, commit = bench.step()
    assert not isinstance(denoise, CausalStep)
    assert (denoise.first_slot, denoise.batch) == (1, 1)
    assert isinstance(commit, CausalStep)
    assert (commit.first_slot, commit.batch) == (0, 3)
    assert commit.write_indices.tolist() == [1, requests[1].sequence.committed, 1]


def test_no_pass_reaches_past_the_rows_that_the_budget_allows() -> None:
    """A long prefill beside a text near the end of its rows: padding would reach past them, so it gets its own pass."""
    bench = Watched(max_batch=2, capacity=64, limit_rows=64, prefill_tokens=100)
    full = bench.submit(30, 2)
    for _ in range(8):  # its prefill
        bench.step()
    assert full.sequence.committed == 30
    late = bench.submit(12, 20)
    passes = bench.step()
    assert len(passes) == 2
    assert late.sequence.committed == PREFILL_STEP
    pool = bench.executor.pool
    assert pool.slots * pool.rows <= 64


def test_siblings_wait_for_the_prefill_and_then_come_first() -> None:
    bench = Watched(max_batch=1)
    first, sibling, other = bench.submit(8), bench.submit(8), bench.submit(8)
    bench.scheduler.waiting.remove(sibling)
    first.siblings = [sibling]
    bench.step()
    assert list(bench.scheduler.waiting) == [other]
    bench.step()  # the prompt is prefilled
    assert list(bench.scheduler.waiting) == [sibling, other]
    assert first.siblings == []


def test_a_trial_pass_has_the_batch_and_the_step_that_it_measures() -> None:
    bench = Watched(max_batch=4)
    bench.passes.append([])

    def measure(run: Any, *_: Any) -> None:
        run("ar", 3, 4)
        run("diffusion", 1, 8)

    bench.cost.measure = measure  # type: ignore[method-assign, assignment]
    bench.scheduler.measure_passes()
    assert [type(step) for step in bench.passes[-1]] == [CausalStep, BidirectionalStep]
    assert [step.input_ids.shape for step in bench.passes[-1]] == [(3, 4), (1, 8)]
    assert [step.top_k for step in bench.passes[-1]] == [1, 1]
    assert bench.passes[-1][1].adapter.tolist() == [True]  # as in a draft
    assert bench.executor.pool.active == 0


def planned(bench: Watched, plan: Callable[[list[Opening]], Plan]) -> None:
    """Replace the choices."""
    bench.scheduler._block_chooser.choose = lambda opening, *_: plan(opening)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("block", "copies", "forgets"), [(1, False, True), (4, False, False), (4, True, True), (1, True, True)]
)
def test_a_cycle_of_auto_without_a_draft_forgets(block: int, copies: bool, forgets: bool) -> None:
    """A fixed mode forgets nothing, whether it copies or drafts."""
    bench, forgotten = Watched(max_batch=2, prefill_tokens=100), []
    requests = [bench.submit(6, mode=mode, lookup=True) for mode in ("auto", "linear_spec")]
    for index, request in enumerate(requests):
        request.sequence.acceptance.forget = lambda cycles, index=index: forgotten.append((index, cycles))  # type: ignore[method-assign]
        # Three tokens of which a copy is known.
        request.sequence.look_up = lambda request=request: request.sequence.acceptance.yields()[:4]  # type: ignore[method-assign]
        request.sequence.open_block = lambda *_, open_block=request.sequence.open_block: open_block(1)  # type: ignore[method-assign]
    planned(bench, lambda opening: Plan(block, 4, [copies] * len(opening), cycles=3))
    for _ in range(3):
        bench.step()
    assert forgotten == [(0, 3)] * forgets
    assert all(len(request.sequence.emitted) == 2 for request in requests)


@pytest.mark.parametrize(
    ("block", "tree", "cycles", "forgets"),
    [(4, False, 3, True), (4, True, 3, False), (1, False, 3, False)],
)
def test_a_choice_of_chains_forgets_what_trees_gained(block: int, tree: bool, cycles: int, forgets: bool) -> None:
    """For all of its cycles at once, when it is made."""
    bench, forgotten = Watched(max_batch=2, prefill_tokens=100), []
    for index, mode in enumerate(("auto", "linear_spec")):
        request = bench.submit(6, mode=mode)
        request.sequence.acceptance.forget_trees = lambda cycles, index=index: forgotten.append((index, cycles))  # type: ignore[method-assign]
        request.sequence.open_block = lambda *_, open_block=request.sequence.open_block: open_block(1)  # type: ignore[method-assign]
    planned(bench, lambda opening: Plan(block, block, [False] * len(opening), tree, cycles=cycles))
    for _ in range(3):
        bench.step()
    assert forgotten == [(0, cycles)] * forgets


@pytest.mark.parametrize("block", [1, 4])
def test_a_kept_choice_forgets_nothing_more(block: int) -> None:
    bench, forgotten, opened = Watched(max_batch=2, prefill_tokens=100), [], []
    for mode in ("auto", "linear_spec"):
        request = bench.submit(1, mode=mode)
        acceptance = request.sequence.acceptance
        acceptance.forget = acceptance.forget_trees = forgotten.append  # type: ignore[method-assign]

        def noted(*choice: Any, open_block: Any = request.sequence.open_block) -> None:
            opened.append(choice)
            open_block(1)

        request.sequence.open_block = noted  # type: ignore[method-assign]
    bench.step()
    chooser = bench.scheduler._block_chooser
    chooser.kept = lambda sequences: Plan(block, 9, [False] * 7, tree=block > 1) if sequences == 2 else None  # type: ignore[method-assign]
    bench.step()
    assert opened == [(block, False, block > 1), (32, False, False)]
    assert forgotten == []
    assert bench.scheduler.stats().drafting.choices == {ChoiceKey(block, "tree" if block > 1 else "none", False): 1}


def test_each_sequence_opens_the_block_that_the_plan_gives_it() -> None:
    """Copies are as long as the plan says; drafts of a fixed mode are its own; no block is longer than its text."""
    bench, opened = Watched(max_batch=8, prefill_tokens=100), []
    requests = [
        bench.submit(1, mode="auto"),
        bench.submit(1, mode="auto", max_tokens=3),
        bench.submit(1, mode="auto", lookup=True),
        bench.submit(1, mode="linear_spec", block_length=6),
        bench.submit(1, mode="linear_spec", block_length=6, lookup=True),
        bench.submit(1, mode="linear_spec", block_length=6, lookup=True),
    ]
    for index, request in enumerate(requests):
        open_block = request.sequence.open_block

        def noted(*block: Any, open_block: Any = open_block, index: int = index) -> None:
            opened.append((index, *block))
            open_block(1)

        request.sequence.open_block = noted  # type: ignore[method-assign]
        if request.sequence.params.lookup:
            request.sequence.look_up = lambda: [1.0, 1.5]  # type: ignore[method-assign]
    planned(bench, lambda opening: Plan(4, 8, [index in (2, 3) for index in range(len(opening))], tree=True))
    bench.step()
    assert opened == []
    bench.step()
    assert opened == [
        (0, 4, False, True),
        (1, 2, False, True),
        (2, 8, True, False),
        (3, 6, False, False),
        (4, 6, True, False),
        (5, 6, False, False),
    ]


def test_a_speculation_runs_only_if_all_take_part() -> None:
    """Others would get no token in a step that is a speculation."""
    bench = Watched(max_batch=2, executor=SpeculatingExactLawExecutor)
    plain, drafting = bench.submit(1, max_tokens=4), bench.submit(1, mode="linear_spec", block_length=4)
    bench.step()
    for emitted in (2, 3, 4):
        drafted = drafting.sequence.counts.draft
        bench.step()
        assert len(plain.sequence.emitted) == emitted
        assert drafting.sequence.counts.draft == drafted + 1
    assert bench.executor.speculations == 0
    bench.step()
    assert bench.executor.speculations == 1


def test_an_executor_that_speculates_drafts_no_trees() -> None:
    bench = Watched(max_batch=1, executor=SpeculatingExactLawExecutor)
    request = bench.submit(1, mode="auto")
    request.sequence.acceptance.tree_gains[:] = [100.0] * len(CHOICES)
    for _ in range(4):
        bench.step()
    assert {cycle.drafting for cycle in request.sequence.cycles} == {"draft", "none"}


def test_a_snapshot_of_the_scheduler() -> None:
    bench = Watched(max_batch=2, prefill_tokens=100)
    requests = [bench.submit(1, max_tokens=tokens) for tokens in (1, 3, 3, 3)]
    assert bench.scheduler.stats() == Stats(0, 4, 1, 0, 0, 0, 0, Counts(), 0, NOTHING_DRAFTED)
    bench.step()
    stats = bench.scheduler.stats()
    assert (stats.running, stats.waiting, stats.slots, stats.steps) == (1, 2, 2, 1)
    assert (stats.finished, stats.failed, stats.emitted, stats.counts) == (1, 0, 1, Counts(prefill=1))
    requests[2].siblings = [bench.submit(1)]
    bench.scheduler.waiting.pop()
    bench.scheduler.fail_all(RuntimeError("out of order"))
    stats = bench.scheduler.stats()
    assert (stats.running, stats.waiting, stats.failed, stats.finished) == (0, 0, 4, 1)
    assert not bench.scheduler.busy


def test_every_aborted_request_ends_in_the_next_step_whether_it_runs_or_waits() -> None:
    bench, ended = Watched(max_batch=3, prefill_tokens=100), []
    requests = [bench.submit(1) for _ in range(6)]
    for index, request in enumerate(requests):
        request._listener = lambda update, index=index: ended.append((index, update.finish_reason))
    requests[4].siblings = [bench.submit(1)]
    sibling = bench.scheduler.waiting.pop()
    sibling._listener = lambda update: ended.append((6, update.finish_reason))
    bench.step()
    for index in (0, 2, 4, 5):
        requests[index].aborted = True
    bench.step()
    assert sorted(entry for entry in ended if entry[1]) == [(index, "cancelled") for index in (0, 2, 4, 5, 6)]
    assert set(bench.running) == {requests[1], requests[3]}
    assert bench.executor.pool.active == 2


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_a_pass_is_timed_by_the_clock_and_a_speculation_is_split(kind: str) -> None:
    """A draft and its verification take 9 s together; by the table, a draft takes twice as long."""
    times = iter(range(0, 900, 9))
    bench = Bench(max_batch=1, end=False, clock=lambda: float(next(times)), executor=SpeculatingExactLawExecutor)
    observed: list[tuple[str, int, int, float]] = []
    bench.cost.seconds = lambda engine, *_: 2.0 if engine == "diffusion" else 1.0  # type: ignore[method-assign]
    bench.cost.observe = lambda *a_pass: observed.append(a_pass)  # type: ignore[method-assign]
    options: dict[str, Any] = {"mode": "ar"} if kind == "ar" else {"mode": "linear_spec", "block_length": 4}
    bench.add((2, 3, 4), SamplingParams(max_tokens=9, **options), lambda _: None)
    bench.scheduler.step()
    bench.scheduler.step()
    expected = [("ar", 1, 3, 9.0)]
    expected += [("ar", 1, 1, 9.0)] if kind == "ar" else [("ar", 1, 4, 3.0), ("diffusion", 1, 4, 6.0)]
    assert sorted(observed, key=lambda a_pass: (a_pass[2] != 3, a_pass[0])) == expected


@pytest.mark.parametrize("kind", ["ar", "linear_spec"])
def test_a_pass_that_was_prepared_tells_nothing_about_its_cost(kind: str) -> None:
    """The first pass of each shape, or cycle, is not observed. Others are observed with the slots that they cover."""
    bench = Bench(max_batch=4, end=False, prefill_tokens=100, executor=PreparingExactLawExecutor)
    observed: list[tuple[str, int, int]] = []
    bench.cost.observe = lambda *a_pass: observed.append(a_pass[:3])  # type: ignore[method-assign]
    options: dict[str, Any] = {"mode": "ar"} if kind == "ar" else {"mode": "linear_spec", "block_length": 4}
    for _ in range(3):
        bench.add((2, 3), SamplingParams(max_tokens=40, **options), lambda _: None)
    bench.scheduler.step()
    assert observed == []  # the prefill
    bench.scheduler.step()
    assert observed == []
    assert bench.executor.pool.active == 3
    bench.scheduler.step()
    assert sorted(observed) == ([("ar", 4, 1)] if kind == "ar" else [("ar", 4, 4), ("diffusion", 4, 4)])


@pytest.mark.parametrize(("executor", "least"), [(SpeculatingExactLawExecutor, 0.5), (PreparingExactLawExecutor, 1.0)])
def test_passes_are_measured_for_some_time_where_the_pool_has_room(
    executor: type[ExactLawExecutor], least: float
) -> None:
    bench, given = Watched(max_batch=4, capacity=64, limit_rows=64, executor=executor), []
    bench.cost.measure = lambda *options: given.append(options)  # type: ignore[method-assign]
    bench.scheduler.measure_passes()
    ((_, seconds, possible, _),) = given
    assert seconds == least
    assert [possible(batch, 16) for batch in (1, 4, 5)] == [True, True, False]
    assert [possible(1, step) for step in (64, 65)] == [True, False]


def test_a_trial_pass_needs_the_logits_of_a_block_or_of_a_prefill() -> None:
    bench = Watched(max_batch=1)
    bench.passes.append([])
    bench.cost.measure = lambda run, *_: [run("ar", 1, step) for step in (8, 32, 33)]  # type: ignore[method-assign]
    bench.scheduler.measure_passes()
    assert [step.logit_rows.tolist() for step in bench.passes[-1]] == [[list(range(8))], [list(range(32))], [[32]]]


def test_a_trial_pass_takes_no_more_slots_than_its_batch() -> None:
    """Four slots of 16 rows are all that the pool may have."""
    bench = Watched(max_batch=4, capacity=64, limit_rows=64)
    bench.passes.append([])
    bench.cost.measure = lambda run, *_: run("ar", 4, 16)  # type: ignore[method-assign]
    bench.scheduler.measure_passes()
    (step,) = bench.passes[-1]
    assert (step.input_ids.shape, step.write_indices.tolist()) == ((4, 16), [0] * 4)
    assert bench.executor.pool.slots == 4


@pytest.mark.parametrize(("rows", "last"), [(56, 3), (57, 2)])
def test_a_pass_is_padded_only_over_slots_that_have_rows_for_it(rows: int, last: int) -> None:
    """The executor prefers all four slots. The fourth has 64 rows."""
    bench = Bench(max_batch=4, capacity=64, executor=PreparingExactLawExecutor)
    for _ in range(4):
        bench.executor.pool.acquire()
    padded = bench.scheduler._passes._padded(Span(0, 2, 8, []), [1, 1, 1, rows], 64)
    assert (padded.first, padded.last) == (0, last)


def test_a_pass_is_repeated_in_the_same_step_and_only_where_its_candidates_are_not_legal() -> None:
    """Of seven tokens, the engine reports three; one token alone is legal. So some passes run twice."""
    bench = Watched(max_batch=2, executor=FewCandidatesExecutor)
    rate = AgainRate()
    rate.observe(0, 0, enough=99)  # no masks before they are needed
    params = SamplingParams(max_tokens=12, mode="ar")
    ruled = bench.add((2,), params, lambda _: None, rules=TokenRules(VOCABULARY, {END}, allowed=[2]))
    ruled.sequence._again_rate = rate
    free = bench.submit(1, max_tokens=12)
    repeated = 0
    for emitted in range(1, 12):
        passes = bench.step()
        assert [len(request.sequence.emitted) for request in (ruled, free)] == [emitted] * 2
        assert [step.batch for step in passes[1:]] in ([], [1])
        repeated += len(passes) - 1
    assert 0 < repeated < 11
    assert ruled.sequence.emitted == [2] * 11
    assert free.sequence.counts.commit == 10
