"""Target rtx without a GPU: on a double of CUDA and TensorRT-RTX, the executor computes what target ``cpu`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from numpy.typing import NDArray

from tests.runtime.rtx.conftest import CAPACITY, MAX_BATCH, MAX_STEP, Engines, Machine
from tests.support.driver_double import FaultError
from tests.support.rtx_double import misremembered_calls
from trimode import LLM, SamplingParams
from trimode.common.errors import TriModeError
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Executor, SpeculatingExecutor
from trimode.runtime.gpu import captured_passes, gpu_executor
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.pass_memory import PassMemory
from trimode.runtime.loading import load_engine
from trimode.runtime.rtx import execution_contexts
from trimode.runtime.rtx.execution_contexts import RtxNetwork
from trimode.runtime.rtx.rtx_executor import RtxExecutor
from trimode.runtime.scheduling.pass_cost import PassCost

MASK = 100
# Relative, fp32 on both sides.
CLOSE, FAR = 1e-4, 1e-2


def test_the_double_has_the_signatures_of_the_real_calls() -> None:
    assert misremembered_calls(tensorrt_rtx) == []


# Whole texts.


MODES: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 16},
    {"mode": "linear_spec", "block_length": 7, "draft_threshold": 0.5, "adapter": False},
    {"mode": "auto", "block_length": 8},
    {"mode": "diffusion", "block_length": 8},
]


def conversations(heldout: list[dict]) -> list[Any]:
    return [record["messages"] for record in heldout[::29][:6]]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("at_once", [1, MAX_BATCH])
def test_tokens_equal_those_of_target_cpu(
    fp16: Engines, heldout: list[dict], options: dict[str, Any], at_once: int
) -> None:
    """Alone and in batches. Texts that begin alike reuse the KV rows of earlier answers."""
    answers = []
    for engine in (fp16.cpu, fp16.rtx):
        with LLM(engine, max_batch_size=at_once) as llm:
            outputs = llm.generate(conversations(heldout), SamplingParams(max_tokens=60, **options))
            answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]


def test_modes_share_a_batch(
    fp16: Engines, machine: Machine, heldout: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than slots, each in its own mode, at the same time. Each call is one launch and one wait.

    All passes have the same cost, so that measured costs, which depend on the machine's load, never split a batch.
    """
    monkeypatch.setattr(PassCost, "least_seconds", lambda *_: 1e-3)
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


def listen(executor: Any) -> list[tuple[str, Any]]:
    """A list that records the name and the step of each later call of ``executor``."""
    calls: list[tuple[str, Any]] = []

    def listening(name: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def called(step: Any) -> Any:
            calls.append((name, step))
            return call(step)

        return called

    for name in ("run", "speculate"):
        setattr(executor, name, listening(name, getattr(executor, name)))
    return calls


@pytest.mark.usefixtures("machine")
def test_a_block_longer_than_a_step_is_refused_before_it_runs(fp16: Engines) -> None:
    with (
        LLM(fp16.rtx, verify=False) as llm,
        pytest.raises(TriModeError, match=r"block_length is 65.*steps of 64"),
    ):
        llm.generate([200], SamplingParams(mode="linear_spec", block_length=65, max_tokens=100))


# Batches of ragged sequences, step by step.

LENGTHS, BLOCKS = (61, 3, 140), (16, 5, 11)
Run = Callable[[Executor], list[NDArray[Any]]]


def rows_of_logits(found: Candidates, lengths: tuple[int, ...]) -> list[NDArray[Any]]:
    """Logits and log-sum-exp of the rows that are not padding, concatenated."""
    whole = np.concatenate([found.logits, found.log_sum_exp[..., None]], axis=-1)
    return [whole[sequence, :length] for sequence, length in enumerate(lengths)]


def prefill(engine: Executor) -> list[NDArray[Any]]:
    """Three sequences of different lengths in slots 0, 1, 2."""
    rng, found = np.random.default_rng(0), []
    for length in LENGTHS:
        ids, slot = rng.integers(101, 768, (1, length)), engine.pool.acquire()
        for start in range(0, length, MAX_STEP):
            chunk = ids[:, start : start + MAX_STEP]
            step = CausalStep.chain(slot, chunk, np.array([start]), np.array([[chunk.shape[1] - 1]]))
            found += rows_of_logits(engine.run(step), (1,))
    return found


def draft_step(first_slot: int = 0, count: int = 3) -> BidirectionalStep:
    """A block after each sequence, of different lengths, padded to the longest; one of them without the adapter."""
    which = slice(first_slot, first_slot + count)
    longest = max(BLOCKS[which])
    ids = np.full((count, longest), MASK)
    ids[:, 0] = np.arange(200, 200 + count)
    rows = np.tile(np.arange(longest), (count, 1))
    adapter = np.array([True, False, True])[which]
    lengths = np.array(BLOCKS[which])
    return BidirectionalStep.block(first_slot, ids, np.array(LENGTHS[which]), rows, lengths, adapter)


def draft_and_commit(engine: Executor) -> list[NDArray[Any]]:
    found = prefill(engine)
    draft = draft_step()
    drafted = engine.run(draft)
    found += rows_of_logits(drafted, BLOCKS)
    verified = engine.run(draft.verification(drafted.tokens[:, :, 0]))
    return found + rows_of_logits(verified, BLOCKS)


def some_of_the_slots(engine: Executor) -> list[NDArray[Any]]:
    """Passes over slots 1 and 2, then over all slots. No pass may change rows of other slots."""
    found = prefill(engine)
    found += rows_of_logits(engine.run(draft_step(1, 2)), BLOCKS[1:])
    return found + rows_of_logits(engine.run(draft_step()), BLOCKS)


def after_a_release(engine: Executor) -> list[NDArray[Any]]:
    """Slot 0 is released: the last sequence moves into it and continues there."""
    found = prefill(engine)
    assert engine.pool.release(0) == 2
    ids = np.random.default_rng(1).integers(101, 768, (2, 9))
    step = CausalStep.chain(0, ids, np.array([LENGTHS[2], LENGTHS[1]]), np.tile(np.arange(9), (2, 1)))
    return found + rows_of_logits(engine.run(step), (9, 9))


def a_tree(engine: Executor) -> list[NDArray[Any]]:
    """A tree of drafts: its block mask is not triangular, and positions are depths."""
    found = prefill(engine)
    mask = np.zeros((1, 5, 5), np.bool_)
    for node, parent in enumerate([None, 0, 0, 1, 2]):
        mask[0, node] = mask[0, parent] if parent is not None else False
        mask[0, node, node] = True
    positions = LENGTHS[1] + np.array([[0, 1, 1, 2, 2]])
    ids = np.array([[300, 301, 302, 303, 304]])
    step = CausalStep(1, ids, positions, np.array([LENGTHS[1]]), np.arange(5)[None], mask)
    return found + rows_of_logits(engine.run(step), (5,))


def up_to_the_capacity(engine: Executor) -> list[NDArray[Any]]:
    """Steps up to the last row. The last ones, of 12, 5 and 1 tokens, leave no room for longer padding."""
    rng, found, at = np.random.default_rng(2), prefill(engine), LENGTHS[2]
    for size in (64, 64, 64, 64, 64, 34, 12, 5, 1):
        rows = np.array([[size - 1]])
        found += rows_of_logits(
            engine.run(CausalStep.chain(2, rng.integers(101, 768, (1, size)), np.array([at]), rows)), (1,)
        )
        at += size
    assert at == CAPACITY
    return found


def prefix_reused(engine: Executor) -> list[NDArray[Any]]:
    """The first rows of a sequence, copied into another slot, are used there."""
    found = prefill(engine)
    engine.pool.write_rows(1, 0, engine.pool.read_rows(2, 0, 100))
    rows = np.arange(40)[None]
    tail = np.random.default_rng(3).integers(101, 768, (1, 40))
    return found + rows_of_logits(engine.run(CausalStep.chain(1, tail, np.array([100]), rows)), (40,))


def again_and_again(engine: Executor) -> list[NDArray[Any]]:
    """Steps of one shape with different tokens: each replay uses its own tokens, not the captured ones."""
    found = prefill(engine)
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(101, 768, (3, 8))
        step = CausalStep.chain(0, ids, np.array(LENGTHS), np.tile(np.arange(8), (3, 1)))
        found += rows_of_logits(engine.run(step), (8, 8, 8))
    return found


def speculated(engine: Executor) -> list[NDArray[Any]]:
    """Draft and commit in one launch if the executor can do this, in two passes otherwise."""
    found = prefill(engine)
    for _ in range(2):
        draft = draft_step()
        if isinstance(engine, SpeculatingExecutor):
            drafted, verified = engine.speculate(draft)
        else:
            drafted = engine.run(draft)
            verified = engine.run(draft.verification(drafted.tokens[:, :, 0]))
        found += rows_of_logits(drafted, BLOCKS) + rows_of_logits(verified, BLOCKS)
    return found


RUNS: list[Run] = [
    *(draft_and_commit, some_of_the_slots, after_a_release, a_tree),
    *(up_to_the_capacity, prefix_reused, again_and_again, speculated),
]


def distances(built: Engines, run: Run) -> list[float]:
    """Relative L2 distance of each result from that of target ``cpu``."""
    expected, found = (
        run(load_engine(built.cpu, verify=False).executor),
        run(load_engine(built.rtx, verify=False).executor),
    )
    return [
        float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("run", RUNS)
def test_results_of_steps_equal_those_of_target_cpu(exact: Engines, run: Run) -> None:
    assert max(distances(exact, run)) < CLOSE


def test_a_speculation_waits_once_and_sends_little(fp16: Engines, machine: Machine) -> None:
    engine = load_engine(fp16.rtx, verify=False).executor
    slot = engine.pool.acquire()
    engine.run(CausalStep.chain(slot, np.arange(200, 240)[None], np.array([0]), np.array([[39]])))
    ids = np.full((1, 32), MASK)
    ids[0, 0] = 300
    draft = BidirectionalStep.block(slot, ids, np.array([40]), np.arange(32)[None], np.array([32]), np.array([True]))
    for _ in range(3):
        waits, crossed, launches = machine.cuda.synchronisations, machine.cuda.crossed, machine.cuda.launches
        drafted, verified = engine.speculate(draft)
        assert machine.cuda.synchronisations - waits == 1
        assert machine.cuda.crossed - crossed <= 4096
    assert machine.cuda.launches - launches == 1
    apart = engine.run(draft)
    np.testing.assert_array_equal(apart.tokens, drafted.tokens)
    np.testing.assert_array_equal(engine.run(draft.verification(apart.tokens[:, :, 0])).tokens, verified.tokens)


@pytest.mark.usefixtures("machine")
def test_a_pass_changes_the_rows_that_it_writes_and_no_others(fp16: Engines) -> None:
    engine = load_engine(fp16.rtx, verify=False).executor
    prefill(engine)
    engine.pool.acquire()
    pool = engine.pool
    noise = np.random.default_rng(0).standard_normal((4, *pool.read_rows(0, 0, CAPACITY).shape)).astype(np.float16)
    for slot in range(4):
        pool.write_rows(slot, 0, noise[slot])
    engine.run(draft_step(1, 2))
    for slot in range(4):
        changed = (pool.read_rows(slot, 0, CAPACITY) != noise[slot]).any(axis=(0, 1, 3))
        written = np.zeros(CAPACITY, np.bool_)
        if slot in (1, 2):
            written[LENGTHS[slot] : LENGTHS[slot] + 16] = True  # 11 tokens, padded
        np.testing.assert_array_equal(changed, written)


# Planted faults that the tests above must detect.


def wrong_alias(patch: pytest.MonkeyPatch) -> None:
    """A layer's updated keys are bound to the memory of its values, and its values to that of its keys."""
    cache_outputs = execution_contexts.cache_outputs

    def crossed(layers: int) -> list[str]:
        first, second, *rest = cache_outputs(layers)
        return [second, first, *rest]

    patch.setattr(execution_contexts, "cache_outputs", crossed)


def keys_of_another_layer(patch: pytest.MonkeyPatch) -> None:
    """One engine uses the keys of layer 0 as those of layer 1, aliases included."""
    address, bind = DeviceKvPool.address, RtxNetwork.bind
    crossed = {0: 2, 2: 0}

    def binding(self: Any, bucket: Any, inputs: Any, results: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if bucket.kind is BidirectionalStep:
                inner.setattr(
                    DeviceKvPool, "address", lambda self, cache, slot: address(self, crossed.get(cache, cache), slot)
                )
            return bind(self, bucket, inputs, results)

    patch.setattr(RtxNetwork, "bind", binding)


def window_too_short(patch: pytest.MonkeyPatch) -> None:
    bucket_of = gpu_executor.bucket_of
    patch.setattr(gpu_executor, "bucket_of", lambda *given: bucket_of(*given)._replace(window=128))


def stale_graph(patch: pytest.MonkeyPatch) -> None:
    """A graph captured for other slots is replayed."""
    admit, first = RtxExecutor._admit, {}

    def admitting(self: Any, step: Any) -> Any:
        bucket = admit(self, step)
        return first.setdefault(bucket._replace(first_slot=0), bucket)

    patch.setattr(RtxExecutor, "_admit", admitting)


def slot_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """The last sequence of a batch is read from the next slot."""
    address = DeviceKvPool.address
    patch.setattr(
        DeviceKvPool,
        "address",
        lambda self, cache, slot: address(self, cache, slot + 1 if slot == 1 else slot),
    )


def padding_is_attended_to(patch: pytest.MonkeyPatch) -> None:
    """Padding counts as tokens of the block."""
    put = PassMemory.put

    def putting(self: Any, step: Any) -> None:
        put(self, step)
        if "step_lengths" in self._views:
            self._views["step_lengths"][...] = self._views["input_ids"].shape[1]

    patch.setattr(PassMemory, "put", putting)


def padding_attends_to_nothing(patch: pytest.MonkeyPatch) -> None:
    put = PassMemory.put

    def putting(self: Any, step: Any) -> None:
        put(self, step)
        if "block_mask" in self._views:
            self._views["block_mask"][:, step.input_ids.shape[1] :] = False

    patch.setattr(PassMemory, "put", putting)


def draft_not_copied(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(captured_passes.SpeculationCycle, "_copy_drafted", lambda _self: None)


def results_taken_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(captured_passes.CapturedWork, "run", lambda self: self._enqueue())


def padded_past_the_capacity(patch: pytest.MonkeyPatch) -> None:
    bucket_of = gpu_executor.bucket_of
    patch.setattr(gpu_executor, "bucket_of", lambda *given: _padded(bucket_of(*given)))


def _padded(bucket: Bucket) -> Bucket:
    return bucket._replace(step=1 << (bucket.step - 1).bit_length())


def test_a_window_that_is_too_short_is_detected(exact: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the engines attend to windows. Engines that read the pool in place have none."""
    windowed = "window_rows" in exact.plans[0].graph.read_bytes().decode(errors="replace")
    window_too_short(monkeypatch)
    found = max(distances(exact, draft_and_commit))
    assert found > FAR if windowed else found < CLOSE


@pytest.mark.parametrize(
    ("plant", "run"),
    [
        (wrong_alias, draft_and_commit),
        (keys_of_another_layer, draft_and_commit),
        (stale_graph, some_of_the_slots),
        (slot_off_by_one, draft_and_commit),
        (padding_is_attended_to, draft_and_commit),
        (padding_attends_to_nothing, draft_and_commit),
        (draft_not_copied, speculated),
        (results_taken_early, draft_and_commit),
        (padded_past_the_capacity, up_to_the_capacity),
    ],
)
def test_a_planted_fault_is_detected(
    exact: Engines, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], run: Run
) -> None:
    plant(monkeypatch)
    try:
        found = max(distances(exact, run))
    except FaultError:
        return
    assert not found < FAR
