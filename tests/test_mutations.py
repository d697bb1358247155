"""The guards are awake: each of these faults, planted in the engine, moves its logits far past the bar of parity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimode.build import network, raw_pool
from trimode.build.engine import CpuOptions, build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.model.loading import load_reference
from trimode.model.manifest import Manifest
from trimode.model.reference import NemotronLabsDiffusionModel
from trimode.model.reference_decoding import bidirectional, causal
from trimode.runtime.cpu_executor import CpuExecutor
from trimode.runtime.executor import BidirectionalStep, CausalStep

MASK, LENGTH, BLOCK, PARITY = 100, 600, 16, 1e-4


@pytest.fixture(scope="module")
def reference(random_int4_checkpoint: Path) -> NemotronLabsDiffusionModel:
    return load_reference(Checkpoint(random_int4_checkpoint))


@torch.no_grad()
def distances(engine: Path, reference: NemotronLabsDiffusionModel, shift: int = 0, adapter: bool = True) -> list[float]:
    """Relative L2 of (prefill, draft, commit) logits at positions past a query-scaling step.

    ``shift`` moves the block's rows and positions; ``adapter`` is what the engine is told, the reference having it on.
    """
    executor, rng = CpuExecutor(engine, Manifest.read(engine)), np.random.default_rng(0)
    ids = rng.integers(101, 768, (1, LENGTH + BLOCK))
    masked = ids[:, LENGTH:].copy()
    masked[0, 1:] = MASK
    slot, rows, at = executor.pool.acquire(), np.arange(BLOCK)[None], np.array([LENGTH + shift])
    last, size = np.array([[LENGTH - 1]]), np.array([BLOCK])
    found = [
        executor.run(CausalStep.chain(slot, ids[:, :LENGTH], np.array([0]), last)),
        executor.run(BidirectionalStep.block(slot, masked, at, rows, size, np.array([adapter]))),
        executor.run(CausalStep.chain(slot, ids[:, LENGTH:], at, rows)),
    ]

    def run(tokens: np.ndarray, past: Any, pattern: Callable[..., torch.Tensor], on: bool) -> tuple[Any, Any]:
        start = 0 if past is None else LENGTH
        with reference.draft_adapter(on):
            hidden, present = reference.encoder(
                torch.from_numpy(tokens),
                torch.arange(start, start + tokens.shape[1])[None],
                pattern(1, tokens.shape[1], start),
                past,
            )
            return reference.diffusion_head(hidden).numpy(), present

    prefill, past = run(ids[:, :LENGTH], None, causal, on=False)
    expected = [
        prefill[:, -1:],
        run(masked, past, bidirectional, on=True)[0],
        run(ids[:, LENGTH:], past, causal, on=False)[0],
    ]
    result = []
    for candidates, reference_logits in zip(found, expected, strict=True):
        dense = np.empty_like(candidates.logits)
        np.put_along_axis(dense, candidates.tokens, candidates.logits, axis=-1)
        difference = np.delete(dense - reference_logits, MASK, axis=-1)
        result.append(float(np.linalg.norm(difference) / np.linalg.norm(np.delete(reference_logits, MASK, axis=-1))))
    return result


def plain_rope(config: Any) -> tuple[np.ndarray, float]:
    pair = np.arange(config.head_dim // 2, dtype=np.float32)
    return config.rope_parameters.rope_theta ** (-2 * pair / config.head_dim), 1.0


def without_query_scaling(build: Callable[..., Any]) -> Callable[..., Any]:
    def built(self: Any, position_ids: str) -> Any:
        _, key = build(self, position_ids)
        return key, key

    return built


def one_token_further(visible: Callable[..., Any]) -> Callable[..., Any]:
    """Each query of the causal engine sees one token further."""

    def built(self: Any, input_ids: str, visibility: str) -> Any:
        if self.pattern == "causal":
            one = self.graph.constant("shift_by_one", np.array([1], np.int64))
            self.write_indices, kept = self.op("Add", self.write_indices, one), self.write_indices
            result = visible(self, input_ids, visibility)
            self.write_indices = kept
            return result
        return visible(self, input_ids, visibility)

    return built


def high_nibble_first(packed: np.ndarray) -> np.ndarray:
    return (packed << 4) | (packed >> 4)


def swap_packed(put: Callable[..., Any]) -> Callable[..., Any]:
    def putting(self: Any, name: str, array: np.ndarray, *rest: Any) -> Any:
        return put(self, name, high_nibble_first(array) if array.dtype == np.uint8 else array, *rest)

    return putting


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "YaRN": lambda patch: patch.setattr(network, "yarn_frequencies", plain_rope),
    "query scaling": lambda patch: patch.setattr(
        network._Network, "_rotations", without_query_scaling(network._Network._rotations)
    ),
    "mask": lambda patch: patch.setattr(network._Network, "_visible", one_token_further(network._Network._visible)),
    "packing order": lambda patch: patch.setattr(raw_pool._Writer, "_put", swap_packed(raw_pool._Writer._put)),
}


def test_the_engine_without_a_fault_is_within_the_bar(random_int4_engine: Path, reference: Any) -> None:
    assert max(distances(random_int4_engine, reference)) < PARITY


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_fault_is_seen(
    name: str, random_int4_checkpoint: Path, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTATIONS[name](monkeypatch)
    target = CpuOptions(unpacked_bytes=0)
    build_engine(Checkpoint(random_int4_checkpoint), tmp_path / "engine", target=target, top_k=768)
    assert max(distances(tmp_path / "engine", reference)) > 10 * PARITY


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_block_one_row_off_is_seen(shift: int, random_int4_engine: Path, reference: Any) -> None:
    _, draft, commit = distances(random_int4_engine, reference, shift=shift)
    assert min(draft, commit) > 10 * PARITY


def test_an_adapter_left_off_is_seen(random_int4_engine: Path, reference: Any) -> None:
    prefill, draft, commit = distances(random_int4_engine, reference, adapter=False)
    assert draft > 10 * PARITY
    assert max(prefill, commit) < PARITY
