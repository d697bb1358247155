"""Both engines of the cpu target against the PyTorch reference: logits of every kind of pass, at all lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from trimode.engine.manifest import Manifest
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.model.reference.patterns import bidirectional, causal
from trimode.runtime.cpu.cpu_executor import CpuExecutor
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Ints

MASK = 100
BAR = 1e-4


class Pair(NamedTuple):
    """An engine and the reference of the same weights."""

    executor: CpuExecutor
    reference: NemotronLabsDiffusionModel


@pytest.fixture(scope="module", params=["random", "random_int4", "random_unpacked"])
def pair(request: pytest.FixtureRequest) -> Pair:
    engine: Path = request.getfixturevalue(f"{request.param}_engine")
    whole = request.param == "random"
    checkpoint: Path = request.getfixturevalue("random_checkpoint" if whole else "random_int4_checkpoint")
    executor = CpuExecutor(engine, Manifest.read(engine))
    return Pair(executor, load_reference(Checkpoint(checkpoint)))


@pytest.fixture(autouse=True)
def slot(pair: Pair) -> Iterator[int]:
    slot = pair.executor.pool.acquire()
    yield slot
    pair.executor.pool.release(slot)


def logits_of(found: Candidates) -> np.ndarray:
    """[B, R, vocabulary], from an engine that reports every token; the mask token is left out."""
    dense = np.full_like(found.logits, np.nan)
    np.put_along_axis(dense, found.tokens, found.logits, axis=-1)
    assert not np.isnan(dense).any()
    return np.delete(dense, MASK, axis=-1)


def distance(found: np.ndarray, expected: torch.Tensor) -> float:
    """Relative L2."""
    reference = np.delete(expected.numpy(), MASK, axis=-1)
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


@torch.no_grad()
def reference_logits(pair: Pair, ids: Ints, start: int, pattern: str, past: list | None, adapter: bool) -> tuple:
    visible = (causal if pattern == "causal" else bidirectional)(1, ids.shape[1], start)
    positions = torch.arange(start, start + ids.shape[1])[None]
    with pair.reference.draft_adapter(adapter):
        hidden, present = pair.reference.encoder(torch.from_numpy(ids), positions, visible, past)
        return pair.reference.diffusion_head(hidden), present


def random_ids(rng: np.random.Generator, count: int) -> Ints:
    return rng.integers(101, 768, (1, count))


# Lengths around the steps of the query scale (512, 1024, ...) and long ones.
@pytest.mark.parametrize("length", [1, 7, 130, 511, 512, 1025, 2900, 4064])
def test_prefill_draft_and_commit_logits(pair: Pair, slot: int, length: int) -> None:
    rng = np.random.default_rng(length)
    executor, block = pair.executor, 32
    prompt, past, last = random_ids(rng, length), None, np.empty(0)
    for begin in range(0, length, 256):
        chunk = prompt[:, begin : begin + 256]
        last = logits_of(
            executor.run(CausalStep.chain(slot, chunk, np.array([begin]), np.array([[chunk.shape[1] - 1]])))
        )
        expected, past = reference_logits(pair, chunk, begin, "causal", past, adapter=False)
    assert distance(last[0], expected[0, -1:]) < BAR

    ids = random_ids(rng, block)
    ids[0, 1:] = np.where(rng.random(block - 1) < 0.7, MASK, ids[0, 1:])
    every, at = np.arange(block)[None], np.array([length])
    for adapter in (True, False):
        step = BidirectionalStep.block(slot, ids, at, every, np.array([block]), np.array([adapter]))
        drafted = logits_of(executor.run(step))
        expected, _ = reference_logits(pair, ids, length, "bidirectional", past, adapter)
        assert distance(drafted[0], expected[0]) < BAR

    # The commit overwrites the draft's rows and does not attend to them.
    ids = random_ids(rng, block)
    committed = logits_of(executor.run(CausalStep.chain(slot, ids, at, every)))
    expected, _ = reference_logits(pair, ids, length, "causal", past, adapter=False)
    assert distance(committed[0], expected[0]) < BAR


def test_log_sum_exp_is_over_the_whole_vocabulary_without_the_mask_token(pair: Pair, slot: int) -> None:
    ids = random_ids(np.random.default_rng(0), 9)
    found = pair.executor.run(CausalStep.chain(slot, ids, np.array([0]), np.arange(9)[None]))
    expected, _ = reference_logits(pair, ids, 0, "causal", None, adapter=False)
    expected[..., MASK] = -torch.inf
    assert np.allclose(found.log_sum_exp[0], expected[0].logsumexp(-1), atol=20 * BAR)
    assert (found.tokens[..., -1] == MASK).all()


def test_logit_rows_come_in_the_order_asked_for(pair: Pair, slot: int) -> None:
    ids = random_ids(np.random.default_rng(1), 12)
    every = pair.executor.run(CausalStep.chain(slot, ids, np.array([0]), np.arange(12)[None]))
    some = pair.executor.run(CausalStep.chain(slot, ids, np.array([0]), np.array([[11, 3, 3]])))
    assert np.array_equal(some.log_sum_exp[0], every.log_sum_exp[0, [11, 3, 3]])


def test_the_best_candidates_are_the_same_however_many_are_asked_for(pair: Pair, slot: int) -> None:
    step = CausalStep.chain(slot, random_ids(np.random.default_rng(5), 12), np.array([0]), np.arange(12)[None])
    every = pair.executor.run(step)
    for top_k in (1, 5):
        some = pair.executor.run(replace(step, top_k=top_k))
        assert np.array_equal(some.tokens, every.tokens[..., :top_k])
        assert np.array_equal(some.logits, every.logits[..., :top_k])
        assert np.array_equal(some.log_sum_exp, every.log_sum_exp)


def test_results_stay_valid_after_the_next_pass(pair: Pair, slot: int) -> None:
    """The executor reuses its buffers, but not those of results that it returned."""
    rng = np.random.default_rng(6)
    steps = [CausalStep.chain(slot, random_ids(rng, 12), np.array([0]), np.arange(12)[None]) for _ in range(2)]
    first = pair.executor.run(steps[0])
    kept = [array.copy() for array in first[:3]]
    second = pair.executor.run(steps[1])
    assert all(np.array_equal(old, now) for old, now in zip(kept, first[:3], strict=True))
    assert not np.array_equal(first.logits, second.logits)


def test_a_tree_of_drafts_is_verified_as_its_paths(pair: Pair, slot: int) -> None:
    """Two continuations in one step, by block_mask and positions, give what each gives alone."""
    rng = np.random.default_rng(2)
    prefix, first, second = random_ids(rng, 20), random_ids(rng, 4), random_ids(rng, 3)
    executor, at = pair.executor, np.array([20])
    executor.run(CausalStep.chain(slot, prefix, np.array([0]), np.array([[19]])))
    alone = [
        logits_of(executor.run(CausalStep.chain(slot, ids, at, np.arange(ids.shape[1])[None])))
        for ids in (first, second)
    ]

    mask = np.zeros((1, 7, 7), np.bool_)
    mask[0, :4, :4], mask[0, 4:, 4:] = np.tril(np.ones((4, 4))), np.tril(np.ones((3, 3)))
    positions = np.array([[20, 21, 22, 23, 20, 21, 22]])
    tree = CausalStep(slot, np.concatenate((first, second), 1), positions, at, np.arange(7)[None], mask)
    together = logits_of(executor.run(tree))
    expected = np.concatenate(alone, axis=1)
    assert np.linalg.norm(together - expected) / np.linalg.norm(expected) < BAR


def test_ragged_batch_equals_each_sequence_alone(pair: Pair, slot: int) -> None:
    """Three sequences in one step, with different prefixes, step lengths and adapter flags."""
    rng = np.random.default_rng(3)
    executor = pair.executor
    slots = [slot, executor.pool.acquire(), executor.pool.acquire()]
    lengths, sizes, adapters = [5, 140, 33], [8, 3, 6], [True, False, True]
    prompts = [random_ids(rng, length) for length in lengths]
    blocks = [random_ids(rng, size) for size in sizes]
    alone = []
    for place, prompt, block, adapter in zip(slots, prompts, blocks, adapters, strict=True):
        executor.run(CausalStep.chain(place, prompt, np.array([0]), np.array([[0]])))
        size, at = block.shape[1], np.array([prompt.shape[1]])
        rows = np.arange(size)[None]
        drafted = executor.run(BidirectionalStep.block(place, block, at, rows, np.array([size]), np.array([adapter])))
        alone.append((logits_of(drafted)[0], logits_of(executor.run(CausalStep.chain(place, block, at, rows)))[0]))

    ids = np.full((3, 8), 767)
    for row, block in enumerate(blocks):
        ids[row, : block.shape[1]] = block[0]
    every = np.broadcast_to(np.arange(8), (3, 8))
    drafted = executor.run(
        BidirectionalStep.block(slot, ids, np.array(lengths), every, np.array(sizes), np.array(adapters))
    )
    committed = executor.run(CausalStep.chain(slot, ids, np.array(lengths), every))
    for row, size in enumerate(sizes):
        for together, expected in zip((drafted, committed), alone[row], strict=True):
            found = logits_of(together)[row, :size]
            assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < BAR
    for place in slots[:0:-1]:
        executor.pool.release(place)


def test_rows_below_write_indices_are_never_changed(pair: Pair, slot: int) -> None:
    rng = np.random.default_rng(4)
    executor = pair.executor
    executor.run(CausalStep.chain(slot, random_ids(rng, 40), np.array([0]), np.array([[0]])))
    before = [buffer[slot, :, :25].copy() for buffer in executor.pool.buffers]
    rows, at = np.array([[0]]), np.array([25])
    executor.run(BidirectionalStep.block(slot, random_ids(rng, 8), at, rows, np.array([8]), np.array([True])))
    executor.run(CausalStep.chain(slot, random_ids(rng, 8), at, rows))
    assert all(np.array_equal(old, new[slot, :, :25]) for old, new in zip(before, executor.pool.buffers, strict=True))
