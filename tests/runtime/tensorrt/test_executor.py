"""Target tensorrt without a GPU: on a double of CUDA and TensorRT, the executor computes what target ``cpu`` does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.runtime.tensorrt.conftest import CAPACITY, MAX_BATCH, MAX_STEP, Engines, Machine
from tests.support import executor_cases, gpu_faults
from tests.support.driver_double import FaultError
from tests.support.executor_cases import CLOSE, FAR, RUNS, Run, StepCases
from tests.support.executor_texts import MODES, answers
from tests.support.tensorrt_runtime_double import misremembered_calls
from trimode.engine.manifest import Manifest
from trimode.model.step import COUNTERS
from trimode.runtime.executor import CausalStep
from trimode.runtime.gpu import plan_context
from trimode.runtime.loading import load_engine


def test_the_double_has_the_signatures_of_the_real_calls(tensorrt: ModuleType) -> None:
    runtime = importlib.import_module("tensorrt_bindings.tensorrt").Runtime
    assert misremembered_calls(tensorrt, runtime) == []


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("at_once", [1, MAX_BATCH])
def test_tokens_equal_those_of_target_cpu(
    exact: Engines, heldout: list[dict], options: dict[str, Any], at_once: int
) -> None:
    """Alone and in batches. Texts that begin alike reuse the KV rows of earlier answers."""
    expected, found = (answers(engine, heldout, options, at_once) for engine in (exact.cpu, exact.tensorrt))
    assert found == expected


CASES = StepCases(lengths=(61, 3, 140), blocks=(16, 5, 11), max_step=MAX_STEP, capacity=CAPACITY, vocabulary=768)


def distance(built: Engines, run: Run) -> float:
    """The largest relative L2 distance of a result from that of target ``cpu``."""
    return executor_cases.distance(CASES, run, built.cpu, built.tensorrt)


@pytest.mark.parametrize("run", RUNS)
def test_results_of_steps_equal_those_of_target_cpu(exact: Engines, run: Run) -> None:
    assert distance(exact, run) < CLOSE


@pytest.mark.parametrize("run", [StepCases.draft_and_commit, StepCases.a_tree, StepCases.speculated, StepCases.masked])
def test_graphs_with_more_plugins_give_the_same_results(exact_plugins: Engines, run: Run) -> None:
    assert distance(exact_plugins, run) < CLOSE


def test_graphs_with_more_plugins_give_the_same_tokens(exact_plugins: Engines, heldout: list[dict]) -> None:
    expected, found = (
        answers(engine, heldout, MODES[1], MAX_BATCH) for engine in (exact_plugins.cpu, exact_plugins.tensorrt)
    )
    assert found == expected


def test_a_speculation_waits_once_and_sends_little(exact: Engines, machine: Machine) -> None:
    engine = load_engine(exact.tensorrt, verify=False).executor
    executor_cases.speculate_with_one_wait(engine, machine.cuda)


@pytest.mark.usefixtures("machine")
def test_both_engines_read_one_copy_of_the_weights(exact: Engines, machine: Machine) -> None:
    """One allocation has the size of the pool's file, and every context binds the weights in it."""
    engine = load_engine(exact.tensorrt, verify=False).executor
    CASES.draft_and_commit(engine)
    pool, size = Manifest.read(exact.tensorrt).pool, (exact.tensorrt / "weights/pool.bin").stat().st_size
    (begin,) = [address for address, memory in machine.cuda.allocations.items() if memory.nbytes == size]
    contexts = machine.trt.contexts
    assert len({id(context.engine) for context in contexts}) == 2
    for context in contexts:
        bound = {entry.name: entry.offset for entry in pool}
        assert {name: context.addresses[name] - begin for name in bound} == bound
        assert context.addresses[COUNTERS] == context.addresses[f"{COUNTERS}_out"]


@pytest.mark.usefixtures("machine")
def test_each_shape_has_a_context_of_its_own_and_the_profile_of_its_length(exact: Engines, machine: Machine) -> None:
    engine = load_engine(exact.tensorrt, verify=False).executor
    for length in (1, 2, 40, 64, 65, 80, 1, 40, 80):  # padded to 1, 2, 64, 64, 80, 80, 1, 64, 80
        step = CausalStep.chain(0, np.full((1, length), 300), np.array([0]), np.array([[0]]))
        engine.run(step)
    profiles = {context.shapes["input_ids"]: context.profile for context in machine.trt.contexts}
    assert profiles == {(1, 1): 0, (1, 2): 1, (1, 64): 1, (1, 80): 2}
    assert len(machine.trt.contexts) == 4


@pytest.mark.usefixtures("machine")
def test_more_asked_ids_than_a_plan_takes_are_refused(exact: Engines) -> None:
    executor_cases.ask_as_many_as_plans_take(load_engine(exact.tensorrt, verify=False).executor)


# Planted faults that the tests above must detect.


def weights_shifted(patch: pytest.MonkeyPatch) -> None:
    """The weights are bound one page too far."""
    bind = plan_context.PlanContext.bind_address

    def binding(self: Any, name: str, address: int) -> None:
        bind(self, name, address + 4096 if name.startswith("encoder.layers.0.mlp") else address)

    patch.setattr(plan_context.PlanContext, "bind_address", binding)


def first_profile_always(patch: pytest.MonkeyPatch) -> None:
    network = importlib.import_module("trimode.runtime.tensorrt.tensorrt_network").TensorrtNetwork
    patch.setattr(network, "_profile", lambda _self, _step: 0)


def one_context_for_all_shapes(patch: pytest.MonkeyPatch) -> None:
    """A context is used again for another shape."""
    double = importlib.import_module("tests.support.tensorrt_runtime_double").EngineDouble
    create = double.create_execution_context

    def creating(self: Any, strategy: Any) -> Any:
        if not hasattr(self, "only"):
            self.only = create(self, strategy)
        return self.only

    patch.setattr(double, "create_execution_context", creating)


@pytest.mark.parametrize(
    ("plant", "run"),
    [
        (weights_shifted, StepCases.draft_and_commit),
        (first_profile_always, StepCases.draft_and_commit),
        (one_context_for_all_shapes, StepCases.draft_and_commit),
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
    except (FaultError, RuntimeError):  # the executor itself finds no profile for a step that is too long
        return
    assert not found < FAR
