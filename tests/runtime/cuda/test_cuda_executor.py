"""Target cuda without a GPU: on a double of the CUDA driver, the executor computes what target ``cpu`` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.cuda.conftest import CAPACITY, CASES, TOP_K, VOCABULARY, Engines, Gpu
from tests.support.driver_double import FaultError
from tests.support.executor_cases import CLOSE, FAR, MASK, RUNS, Run, StepCases, distance
from tests.support.gpu_faults import (
    draft_not_copied,
    padding_is_attended_to,
    results_taken_early,
    slot_off_by_one,
    stale_graph,
)
from trimode.build.cpu.target import CpuTarget
from trimode.build.engine_builder import build_engine
from trimode.common.errors import TriModeError
from trimode.model.checkpoint import Checkpoint
from trimode.model.step import cache_inputs
from trimode.plugins import arena
from trimode.runtime.cuda import cuda_network
from trimode.runtime.executor import (
    BidirectionalStep,
    Candidates,
    CausalStep,
    PreparingExecutor,
    SpeculatingExecutor,
)
from trimode.runtime.gpu import captured_passes
from trimode.runtime.loading import load_engine

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("run", RUNS)
def test_results_of_steps_equal_those_of_target_cpu(small: Engines, gpu: Gpu, run: Run) -> None:
    gpu(small)
    assert distance(CASES, run, small.cpu, small.cuda) < CLOSE


def test_a_warm_cycle_is_one_launch_and_one_wait(small: Engines, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is launched outside a graph, and nothing is allocated."""
    driver = gpu(small)
    engine = load_engine(small.cuda, verify=False).executor
    assert isinstance(engine, SpeculatingExecutor)
    CASES.prefill(engine)
    draft = CASES.draft_step()
    first = engine.speculate(draft)

    def refuse(*_arguments: object) -> None:
        raise AssertionError("a warm cycle allocates")

    for call in ("cuMemAlloc", "cuMemHostAlloc", "cuMemCreate"):
        monkeypatch.setattr(driver, call, refuse)
    waits, graphs, kernels = driver.synchronisations, driver.launches, len(driver.kernel_launches)
    again = engine.speculate(draft)
    assert driver.synchronisations - waits == driver.launches - graphs == 1
    assert len(driver.kernel_launches) == kernels
    np.testing.assert_array_equal(again.drafted.tokens, first.drafted.tokens)


def test_token_masks_asked_ids_and_single_candidates_follow_from_all_logits(
    small: Engines, gpu: Gpu, tmp_path: Path
) -> None:
    """All logits are those of target cpu. In the second row, fewer tokens are legal than the engine returns."""
    build_engine(
        Checkpoint(small.checkpoint),
        tmp_path / "all",
        target=CpuTarget(activations="fp32"),
        capacity=CAPACITY,
        top_k=VOCABULARY,
    )
    gpu(small)
    rng, length = np.random.default_rng(0), 4
    legal = rng.random((length, VOCABULARY)) < 0.5
    legal[1] = False
    legal[1, [7, 300]] = True
    legal[:, MASK] = False  # it never is
    rows = np.arange(length)
    step = CausalStep.chain(0, rng.integers(MASK + 1, VOCABULARY, (1, length)), np.array([0]), rows[None])
    executors = [load_engine(engine, verify=False).executor for engine in (tmp_path / "all", small.cuda)]
    for executor in executors:
        executor.pool.acquire()
    everything = executors[0].run(step)
    logits = np.empty((length, VOCABULARY), np.float32)
    np.put_along_axis(logits, everything.tokens[0], everything.logits[0], axis=-1)

    asked = rng.integers(MASK + 1, VOCABULARY, (1, length, 3))
    words = np.packbits(legal, axis=-1, bitorder="little").view(np.uint32)
    found = executors[1].run(replace(step, token_mask=words[None], asked_ids=asked))
    masked = np.where(legal, logits, -np.inf)
    best = np.argsort(-masked, axis=-1, kind="stable")[:, :TOP_K]
    for row in rows:
        count = min(TOP_K, int(legal[row].sum()))
        assert found.tokens[0, row, :count].tolist() == best[row, :count].tolist()
        np.testing.assert_allclose(found.logits[0, row, :count], masked[row, best[row, :count]], rtol=CLOSE, atol=CLOSE)
        assert (found.logits[0, row, count:] < -1e29).all()
    sums = np.log(np.exp(masked).sum(-1))
    np.testing.assert_allclose(found.log_sum_exp[0], sums, rtol=CLOSE, atol=CLOSE)
    assert found.asked_logits is not None
    wanted = np.take_along_axis(logits, asked[0], axis=-1)
    np.testing.assert_allclose(found.asked_logits[0], wanted, rtol=CLOSE, atol=CLOSE)

    single = executors[1].run(replace(step, top_k=1))
    assert single.tokens.shape == (1, length, 1)
    np.testing.assert_array_equal(single.tokens[..., 0], everything.tokens[..., 0])


def test_a_cycle_returns_the_candidates_that_each_of_its_passes_needs(small: Engines, gpu: Gpu) -> None:
    """A greedy cycle sends one candidate of each row; a drawn one sends the engine's number of those it draws from."""
    driver = gpu(small)
    engine = load_engine(small.cuda, verify=False).executor
    assert isinstance(engine, SpeculatingExecutor)
    CASES.prefill(engine)
    draft, sent, found = replace(CASES.draft_step(), top_k=1), [], []
    for top_k in (1, None):
        before = driver.crossed
        found.append(engine.speculate(draft, top_k))
        sent.append(driver.crossed - before)
    (one, greedy), (again, drawn) = found
    assert [each.tokens.shape[2] for each in (one, greedy, again, drawn)] == [1, 1, 1, TOP_K]
    np.testing.assert_array_equal(greedy.tokens[..., 0], drawn.tokens[..., 0])
    assert sent[0] < sent[1]


def test_passes_of_one_shape_are_prepared_once_and_first_captured_at_slot_0(
    small: Engines, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal tokens in other slots give equal results, also where a graph is replayed between passes at other slots."""
    driver, shapes = gpu(small), []
    executor = load_engine(small.cuda, verify=False).executor
    prepare = cuda_network.CudaNetwork.prepare

    def noting(self: Any, bucket: Any, *tensors: Any) -> Any:
        shapes.append(bucket)
        return prepare(self, bucket, *tensors)

    monkeypatch.setattr(cuda_network.CudaNetwork, "prepare", noting)
    for _ in range(3):
        executor.pool.acquire()
    ids = np.array([[301, 302, 303]])
    found = [
        executor.run(CausalStep.chain(slot, ids, np.array([0]), np.arange(3)[None])) for slot in (0, 2, 1, 0, 2, 0)
    ]
    assert (len(shapes), driver.captures, driver.launches) == (1, 1, 2)
    for other in found[1:]:
        np.testing.assert_array_equal(other.logits, found[0].logits)
    rows = [executor.pool.read_rows(slot, 0, 3) for slot in range(3)]
    assert rows[0].any()
    np.testing.assert_array_equal(rows[1], rows[0])
    np.testing.assert_array_equal(rows[2], rows[0])


def test_passes_at_other_slots_are_captured_when_they_have_run_often_and_only_some_of_them(
    small: Engines, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph at one slot is not changed when the launches that it was captured from move to another slot."""
    monkeypatch.setattr(captured_passes, "RUNS_BEFORE_CAPTURE", 2)
    monkeypatch.setattr(captured_passes, "MOST_MOVED_GRAPHS", 1)
    driver = gpu(small)
    executor = load_engine(small.cuda, verify=False).executor
    assert isinstance(executor, PreparingExecutor)
    for _ in range(3):
        executor.pool.acquire()
    ids, seen = {slot: np.array([[301 + slot, 302, 303]]) for slot in range(3)}, []

    def run(slot: int) -> Candidates:
        found = executor.run(CausalStep.chain(slot, ids[slot], np.array([0]), np.arange(3)[None]))
        seen.append((driver.captures, driver.launches, executor.preparations))
        return found

    first, other = run(1), run(2)
    run(1)
    run(2)
    again = run(1)
    assert seen == [(0, 0, 1), (0, 0, 2), (1, 0, 3), (1, 0, 3), (1, 1, 3)]
    np.testing.assert_array_equal(again.logits, first.logits)
    assert not np.array_equal(other.logits, first.logits)
    rows = [executor.pool.read_rows(slot, 0, 3) for slot in (1, 2)]
    assert not np.array_equal(*rows)


# Planted faults that the tests above must detect.


def activations_overlap(patch: pytest.MonkeyPatch) -> None:
    """Each temporary tensor is taken to be read by the launch that writes it only."""
    placed = arena._placed
    patch.setattr(
        arena,
        "_placed",
        lambda sizes, lifetimes: placed(
            sizes, {name: lifetime._replace(last=lifetime.first) for name, lifetime in lifetimes.items()}
        ),
    )


def wrong_alias(patch: pytest.MonkeyPatch) -> None:
    """Values are bound to the memory of keys and keys to that of values, in the diffusion engine only."""
    bind = cuda_network.CudaNetwork.bind

    def crossed(layers: int) -> list[str]:
        first, second, *rest = cache_inputs(layers)
        return [second, first, *rest]

    def binding(self: Any, bucket: Any, inputs: Any, results: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if bucket.kind is BidirectionalStep:
                inner.setattr(cuda_network, "cache_inputs", crossed)
            return bind(self, bucket, inputs, results)

    patch.setattr(cuda_network.CudaNetwork, "bind", binding)


def launches_not_moved(patch: pytest.MonkeyPatch) -> None:
    """Passes of one shape write into slot 0, whatever their slot is."""
    patch.setattr(cuda_network._MovableLaunches, "move_to", lambda _self, _slot: None)


@pytest.mark.parametrize(
    ("plant", "run"),
    [
        (launches_not_moved, StepCases.draft_and_commit),
        (activations_overlap, StepCases.prefill),
        (wrong_alias, StepCases.draft_and_commit),
        (stale_graph, StepCases.some_of_the_slots),
        (slot_off_by_one, StepCases.draft_and_commit),
        (padding_is_attended_to, StepCases.draft_and_commit),
        (draft_not_copied, StepCases.speculated),
        (results_taken_early, StepCases.prefill),
    ],
)
def test_a_planted_fault_is_detected(
    small: Engines, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, plant: Plant, run: Run
) -> None:
    gpu(small)
    plant(monkeypatch)
    try:
        found = distance(CASES, run, small.cpu, small.cuda)
    except (FaultError, TriModeError):
        return
    assert not found < FAR
