"""Target rtx without a GPU: on a double of CUDA and TensorRT-RTX, the executor computes what target ``cpu`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx

from tests.runtime.rtx.conftest import CAPACITY, MAX_BATCH, MAX_STEP, Engines, Machine
from tests.support import executor_cases, gpu_faults
from tests.support.driver_double import FaultError
from tests.support.executor_cases import CLOSE, FAR, RUNS, Run, StepCases
from tests.support.executor_texts import MODES, answers, conversations, listen
from tests.support.rtx_double import misremembered_calls
from trimode import LLM, SamplingParams
from trimode.common.errors import TriModeError
from trimode.runtime.gpu import gpu_executor
from trimode.runtime.loading import load_engine
from trimode.runtime.scheduling.pass_cost import PassCost


def test_the_double_has_the_signatures_of_the_real_calls() -> None:
    assert misremembered_calls(tensorrt_rtx) == []


# Whole texts.


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("at_once", [1, MAX_BATCH])
def test_tokens_equal_those_of_target_cpu(
    fp16: Engines, heldout: list[dict], options: dict[str, Any], at_once: int
) -> None:
    """Alone and in batches. Texts that begin alike reuse the KV rows of earlier answers."""
    expected, found = (answers(engine, heldout, options, at_once) for engine in (fp16.cpu, fp16.rtx))
    assert found == expected


def test_modes_share_a_batch(
    fp16: Engines, machine: Machine, heldout: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than slots, each in its own mode, at the same time. Each call is one launch and one wait.

    All passes have the same cost, so that measured costs, which depend on the machine's load, never split a batch.
    """
    for name in ("seconds", "least_seconds"):
        monkeypatch.setattr(PassCost, name, lambda *_: 1e-3)
    params = [SamplingParams(max_tokens=40, **options) for options in MODES]
    with LLM(fp16.cpu) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(conversations(heldout)[:5], params)]
    with LLM(fp16.rtx, prefix_cache_bytes=0) as llm:
        assert llm._executor.pool.slots == MAX_BATCH
        calls = listen(llm._executor)
        waits, launches, captures = machine.cuda.synchronisations, machine.cuda.launches, machine.cuda.captures
        with llm._thread._changed:  # none begins before all are submitted
            outputs = [llm.generate_async(*each) for each in zip(conversations(heldout)[:5], params, strict=True)]
        found = [output.result().outputs[0].token_ids for output in outputs]
    assert found == expected
    assert machine.cuda.synchronisations - waits == len(calls)
    assert machine.cuda.launches - launches + machine.cuda.captures - captures == len(calls)
    assert machine.cuda.launches > machine.cuda.captures
    assert max(step.batch for _, step in calls) == MAX_BATCH


def test_self_speculation_waits_once_a_cycle(fp16: Engines, machine: Machine, heldout: list[dict]) -> None:
    params = SamplingParams(max_tokens=40, mode="linear_spec", block_length=16)
    with LLM(fp16.cpu) as llm:
        expected = llm.generate(conversations(heldout)[0], params).outputs[0]
    with LLM(fp16.rtx) as llm:
        calls = listen(llm._executor)
        output = llm.generate(conversations(heldout)[0], params).outputs[0]
    kinds = [kind for kind, _ in calls]
    chunks = output.counts.prefill
    assert kinds == ["run"] * chunks + ["speculate"] * output.counts.cycles
    assert output.counts.draft == output.counts.commit == output.counts.cycles > 1
    assert output.counts == expected.counts  # the same drafts were accepted
    assert machine.cuda.launches > 0


@pytest.mark.usefixtures("machine")
def test_a_block_longer_than_a_step_is_refused_before_it_runs(fp16: Engines) -> None:
    with (
        LLM(fp16.rtx, verify=False) as llm,
        pytest.raises(TriModeError, match=r"block_length is 65.*steps of 64"),
    ):
        llm.generate([200], SamplingParams(mode="linear_spec", block_length=65, max_tokens=100))


# Batches of ragged sequences, step by step.

CASES = StepCases(lengths=(61, 3, 140), blocks=(16, 5, 11), max_step=MAX_STEP, capacity=CAPACITY, vocabulary=768)


def distance(built: Engines, run: Run) -> float:
    """The largest relative L2 distance of a result from that of target ``cpu``."""
    return executor_cases.distance(CASES, run, built.cpu, built.rtx)


@pytest.mark.parametrize("run", RUNS)
def test_results_of_steps_equal_those_of_target_cpu(exact: Engines, run: Run) -> None:
    assert distance(exact, run) < CLOSE


def test_a_speculation_waits_once_and_sends_little(fp16: Engines, machine: Machine) -> None:
    engine = load_engine(fp16.rtx, verify=False).executor
    draft, (drafted, verified) = executor_cases.speculate_with_one_wait(engine, machine.cuda)
    apart = engine.run(draft)
    np.testing.assert_array_equal(apart.tokens, drafted.tokens)
    np.testing.assert_array_equal(engine.run(draft.verification(apart.tokens[:, :, 0])).tokens, verified.tokens)


@pytest.mark.usefixtures("machine")
def test_a_pass_changes_the_rows_that_it_writes_and_no_others(fp16: Engines) -> None:
    engine = load_engine(fp16.rtx, verify=False).executor
    CASES.prefill(engine)
    engine.pool.acquire()
    pool = engine.pool
    noise = np.random.default_rng(0).standard_normal((4, *pool.read_rows(0, 0, CAPACITY).shape)).astype(np.float16)
    for slot in range(4):
        pool.write_rows(slot, 0, noise[slot])
    engine.run(CASES.draft_step(1, 2))
    for slot in range(4):
        changed = (pool.read_rows(slot, 0, CAPACITY) != noise[slot]).any(axis=(0, 1, 3))
        written = np.zeros(CAPACITY, np.bool_)
        if slot in (1, 2):
            written[CASES.lengths[slot] : CASES.lengths[slot] + 16] = True  # 11 tokens, padded
        np.testing.assert_array_equal(changed, written)


@pytest.mark.usefixtures("machine")
def test_more_asked_ids_than_a_plan_takes_are_refused(fp16: Engines) -> None:
    executor_cases.ask_as_many_as_plans_take(load_engine(fp16.rtx, verify=False).executor)


# Planted faults that the tests above must detect.


def window_too_short(patch: pytest.MonkeyPatch) -> None:
    bucket_of = gpu_executor.bucket_of
    patch.setattr(gpu_executor, "bucket_of", lambda *given: bucket_of(*given)._replace(window=128))


def test_a_window_that_is_too_short_is_detected(exact: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the engines attend to windows. Engines that read the pool in place have none."""
    windowed = "window_rows" in exact.plans[0].graph.read_bytes().decode(errors="replace")
    window_too_short(monkeypatch)
    found = distance(exact, StepCases.draft_and_commit)
    assert found > FAR if windowed else found < CLOSE


@pytest.mark.parametrize(
    ("plant", "run"),
    [
        (gpu_faults.wrong_alias, StepCases.draft_and_commit),
        (gpu_faults.keys_of_another_layer, StepCases.draft_and_commit),
        (gpu_faults.stale_graph, StepCases.some_of_the_slots),
        (gpu_faults.slot_off_by_one, StepCases.draft_and_commit),
        (gpu_faults.padding_is_attended_to, StepCases.draft_and_commit),
        (gpu_faults.padding_attends_to_nothing, StepCases.draft_and_commit),
        (gpu_faults.masks_not_uploaded, StepCases.masked),
        (gpu_faults.masked_buckets_are_ordinary, StepCases.masked),
        (gpu_faults.asked_ids_in_another_order, StepCases.masked),
        (gpu_faults.rows_of_masks_not_split, StepCases.masked_rows_of_a_long_step),
        (gpu_faults.draft_not_copied, StepCases.speculated),
        (gpu_faults.results_taken_early, StepCases.draft_and_commit),
        (gpu_faults.padded_past_the_capacity, StepCases.up_to_the_capacity),
    ],
)
def test_a_planted_fault_is_detected(
    exact: Engines, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], run: Run
) -> None:
    plant(monkeypatch)
    try:
        found = distance(exact, run)
    except FaultError:
        return
    assert not found < FAR
