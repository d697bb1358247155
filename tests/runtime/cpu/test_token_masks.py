"""Token masks and asked ids on target cpu: the candidates are the best legal tokens of complete logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.random_checkpoint import write_random_checkpoint
from tests.support.token_masks import NEVER, best_legal, packed, random_legal
from trimode.build.engine_builder import build_engine
from trimode.engine.manifest import Manifest
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.patterns import bidirectional, causal
from trimode.runtime.cpu import cpu_executor
from trimode.runtime.cpu.cpu_executor import CpuExecutor
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Ints

MASK, PROMPT, BLOCK = 100, 21, 8
TOLERANCE = 1e-3  # logits are of the order of 10


def executor_of(engine: Path) -> CpuExecutor:
    return CpuExecutor(engine, Manifest.read(engine), threads=1)


def prefilled(executor: CpuExecutor, sequences: int, vocabulary: int = 768) -> Ints:
    """Prompts in slots 0, 1, ...; returns blocks behind them."""
    ids = np.random.default_rng(1).integers(101, vocabulary, (sequences, PROMPT + BLOCK))
    for _ in range(sequences):
        executor.pool.acquire()
    at = np.zeros(sequences, np.int64)
    executor.run(CausalStep.chain(0, ids[:, :PROMPT], at, np.zeros((sequences, 1), np.int64)))
    return ids


def steps_behind(ids: Ints, logit_rows: Ints) -> list[CausalStep | BidirectionalStep]:
    """A pass of each engine over the blocks."""
    batch, blocks, at = len(ids), ids[:, PROMPT:], np.full(len(ids), PROMPT)
    lengths, adapter = np.full(batch, BLOCK), np.ones(batch, np.bool_)
    return [
        CausalStep.chain(0, blocks, at, logit_rows),
        BidirectionalStep.block(0, blocks, at, logit_rows, lengths, adapter),
    ]


@torch.no_grad()
def reference_logits(checkpoint: Path, ids: Ints, step: CausalStep | BidirectionalStep) -> NDArray[np.float32]:
    """Complete logits of the step's logit rows, [B, R, vocabulary]."""
    model = load_reference(Checkpoint(checkpoint))
    batch, found = len(ids), []
    for sequence in range(batch):
        prompt, block = (torch.from_numpy(part) for part in np.split(ids[sequence : sequence + 1], [PROMPT], axis=1))
        positions = torch.arange(PROMPT + BLOCK)[None]
        with model.draft_adapter(False):
            _, past = model.encoder(prompt, positions[:, :PROMPT], causal(1, PROMPT, 0), None)
        pattern = causal if isinstance(step, CausalStep) else bidirectional
        with model.draft_adapter(isinstance(step, BidirectionalStep)):
            hidden, _ = model.encoder(block, positions[:, PROMPT:], pattern(1, BLOCK, PROMPT), past)
            found.append(model.diffusion_head(hidden)[0].numpy()[step.logit_rows[sequence]])
    return np.stack(found)


def assert_candidates(found: Candidates, expected: Candidates) -> None:
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-6, atol=TOLERANCE)
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=1e-6, atol=TOLERANCE)
    # A near-tie may be decided differently: then both tokens have nearly the same logit.
    assert (found.tokens == expected.tokens).mean() > 0.98


@pytest.fixture(scope="module")
def tiny_w4a16(tiny_engine: Path) -> Path:
    """The checkpoint of the tiny engine."""
    return tiny_engine.parent / "w4a16"


@pytest.mark.parametrize("top_k", [1, 2, 17, 64, None])
@pytest.mark.parametrize("kind", [0, 1])
def test_masked_candidates_and_asked_logits_are_the_references(
    tiny_engine: Path, tiny_w4a16: Path, kind: int, top_k: int | None
) -> None:
    """Two sequences; rows with all tokens legal, some, one and none; asked ids that are legal, illegal or repeated."""
    rng, executor = np.random.default_rng(0), executor_of(tiny_engine)
    ids = prefilled(executor, 2)
    step = steps_behind(ids, np.array([[7, 0, 3, 3, 5], [1, 2, 6, 0, 4]]))[kind]
    logits = reference_logits(tiny_w4a16, ids, step)
    vocabulary = logits.shape[-1]
    legal, asked = random_legal(rng, 2, 5, vocabulary), rng.integers(0, vocabulary, (2, 5, 3))
    asked[0, 0] = [MASK, 5, 5]
    found = executor.run(replace(step, token_mask=packed(legal), asked_ids=asked, top_k=top_k))
    k = top_k or 64
    assert found.logits.shape == found.tokens.shape == (2, 5, k)
    assert_candidates(found, best_legal(logits, legal, MASK, k))
    assert found.asked_logits is not None
    np.testing.assert_allclose(found.asked_logits, np.take_along_axis(logits, asked, -1), atol=TOLERANCE)


def complete_logits(found: Candidates) -> NDArray[np.float32]:
    """By token, from an engine that returns the whole vocabulary. The mask token's logit is not among them."""
    logits = np.empty_like(found.logits)
    np.put_along_axis(logits, found.tokens, found.logits, axis=-1)
    return logits


@pytest.mark.parametrize("name", ["random_int8_engine", "random_int4_engine"])
@pytest.mark.parametrize(("sequences", "rows"), [(1, [7]), (1, [7, 2, 0]), (2, [7, 2, 0]), (3, [4])])
def test_masks_follow_their_rows_when_steps_are_padded(
    name: str, sequences: int, rows: list[int], request: pytest.FixtureRequest
) -> None:
    """Steps of engines with int8 activations have an even number of rows. The results are those of the same logits."""
    rng, executor = np.random.default_rng(2), executor_of(request.getfixturevalue(name))
    for step in steps_behind(prefilled(executor, sequences), np.tile(rows, (sequences, 1))):
        logits = complete_logits(executor.run(step))
        legal, asked = random_legal(rng, sequences, len(rows), 768), rng.integers(101, 768, (sequences, len(rows), 5))
        found = executor.run(replace(step, token_mask=packed(legal), asked_ids=asked, top_k=9))
        expected = best_legal(logits, legal, MASK, 9)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.logits, expected.logits)
        np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=1e-5)
        np.testing.assert_array_equal(found.asked_logits, np.take_along_axis(logits, asked, -1))


def in_turns(engine: Path) -> None:
    """Passes of one shape, with and without a mask and asked ids: each is as if it were alone."""
    rng, executor = np.random.default_rng(3), executor_of(engine)
    rows = np.tile(np.arange(4), (2, 1))
    for step in steps_behind(prefilled(executor, 2), rows):
        logits = complete_logits(executor.run(step))
        every = np.ones(logits.shape, np.bool_)
        for turn in range(12):
            legal = random_legal(rng, 2, 4, 768) if turn % 2 else every
            asked = rng.integers(101, 768, (2, 4, turn % 3))
            mask = packed(legal) if turn % 2 else None
            found = executor.run(
                replace(step, token_mask=mask, asked_ids=asked if asked.size else None, top_k=3 + turn % 2)
            )
            expected = best_legal(logits, legal, MASK, 3 + turn % 2)
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=1e-5)
            if asked.size:
                np.testing.assert_array_equal(found.asked_logits, np.take_along_axis(logits, asked, -1))
            else:
                assert found.asked_logits is None


def test_passes_with_and_without_masks_take_turns(random_engine: Path) -> None:
    in_turns(random_engine)


def ignored(patch: pytest.MonkeyPatch) -> None:
    """Passes with masks run in the memory of passes without."""
    inputs = CpuExecutor._inputs
    patch.setattr(CpuExecutor, "_inputs", lambda self, step: inputs(self, replace(step, token_mask=None)))


def reversed_bits(patch: pytest.MonkeyPatch) -> None:
    """The highest byte of each word first."""
    ascontiguousarray = np.ascontiguousarray
    patch.setattr(cpu_executor.np, "ascontiguousarray", lambda array, _type: ascontiguousarray(array, ">u4"))


def stale_shapes(patch: pytest.MonkeyPatch) -> None:
    """The memory of a shape does not depend on the number of asked ids."""
    patch.setattr(CausalStep, "asked", 0)


@pytest.mark.parametrize("plant", [ignored, reversed_bits, stale_shapes])
def test_a_planted_fault_is_seen(
    random_engine: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Any], None]
) -> None:
    plant(monkeypatch)
    with pytest.raises(Exception, match=r".+"):
        in_turns(random_engine)


def test_equal_logits_are_ordered_by_token_id(random_engine: Path) -> None:
    """A row without a legal token: every logit is the same, and candidates are the lowest ids."""
    executor = executor_of(random_engine)
    for step in steps_behind(prefilled(executor, 1), np.array([[0, 5]])):
        legal = np.zeros((1, 2, 768), np.bool_)
        legal[0, 1, 400] = True
        found = executor.run(replace(step, token_mask=packed(legal), top_k=64))
        np.testing.assert_array_equal(found.tokens[0, 0], np.arange(64))
        np.testing.assert_array_equal(found.tokens[0, 1], [400, *range(63)])
        assert (found.logits[0, 0] == NEVER).all()
        assert (found.logits[0, 1, 1:] == NEVER).all()
        assert found.log_sum_exp[0, 0] == NEVER
        assert found.log_sum_exp[0, 1] == pytest.approx(found.logits[0, 1, 0])


def test_a_vocabulary_that_fills_no_word(tmp_path: Path) -> None:
    """771 tokens: the last word has 3 of 32 bits. The others are set and mean nothing."""
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", vocab_size=771)
    build_engine(Checkpoint(checkpoint), tmp_path / "engine", top_k=771)
    rng, executor = np.random.default_rng(4), executor_of(tmp_path / "engine")
    for step in steps_behind(prefilled(executor, 1, 771), np.array([[0, 5, 6, 7]])):
        logits = complete_logits(executor.run(step))
        legal = random_legal(rng, 1, 4, 771)
        words = packed(legal)
        words[..., -1] |= np.uint32(0xFFFFFFF8)
        found = executor.run(replace(step, token_mask=words, top_k=771))
        np.testing.assert_array_equal(found.tokens, best_legal(logits, legal, MASK, 771).tokens)
