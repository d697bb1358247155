"""The tests detect faults: each fault planted in the engine moves the logits of the affected passes far past the parity
threshold, and each fault planted in the runtime changes the text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimode import LLM, SamplingParams
from trimode.build.cpu.target import CpuTarget
from trimode.build.engine_builder import build_engine
from trimode.build.graph import network, raw_pool
from trimode.engine.manifest import Manifest
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.model.reference.patterns import bidirectional, causal
from trimode.runtime.cpu.cpu_executor import CpuExecutor
from trimode.runtime.executor import BidirectionalStep, CausalStep
from trimode.runtime.scheduling import batching

MASK, LENGTH, BLOCK, PADDING, PARITY = 100, 600, 16, 3, 1e-4
PASSES = ("prefill", "draft", "commit")
PROMPT, MAX_TOKENS = list(range(200, 240)), 24
MODES: dict[str, dict[str, Any]] = {
    "ar": {},
    "diffusion": {"block_length": 8, "threshold": 0.9},
    "linear_spec": {"block_length": 8},
}


@pytest.fixture(scope="module")
def reference(random_int4_checkpoint: Path) -> NemotronLabsDiffusionModel:
    return load_reference(Checkpoint(random_int4_checkpoint))


@torch.no_grad()
def distances(engine: Path, reference: NemotronLabsDiffusionModel) -> dict[str, float]:
    """Relative L2 of each pass's logits at positions past a query-scaling step; the draft's step is padded."""
    executor, rng = CpuExecutor(engine, Manifest.read(engine)), np.random.default_rng(0)
    ids = rng.integers(101, 768, (1, LENGTH + BLOCK))
    masked = ids[:, LENGTH:].copy()
    masked[0, 1:] = MASK
    slot, rows, at = executor.pool.acquire(), np.arange(BLOCK)[None], np.array([LENGTH])
    last, size, on = np.array([[LENGTH - 1]]), np.array([BLOCK]), np.array([True])
    padded = np.pad(masked, ((0, 0), (0, PADDING)))
    found = [
        executor.run(CausalStep.chain(slot, ids[:, :LENGTH], np.array([0]), last)),
        executor.run(BidirectionalStep.block(slot, padded, at, rows, size, on)),
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
    result = {}
    for name, candidates, reference_logits in zip(PASSES, found, expected, strict=True):
        dense = np.empty_like(candidates.logits)
        np.put_along_axis(dense, candidates.tokens, candidates.logits, axis=-1)
        difference = np.delete(dense - reference_logits, MASK, axis=-1)
        size_of = np.linalg.norm(np.delete(reference_logits, MASK, axis=-1))
        result[name] = float(np.linalg.norm(difference) / size_of)
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
    """Each query of the causal engine attends to one more token."""

    def built(self: Any, input_ids: str, visibility: str) -> Any:
        if self.pattern == "causal":
            self.write_indices, kept = self.op("Add", self.write_indices, [1]), self.write_indices
            result = visible(self, input_ids, visibility)
            self.write_indices = kept
            return result
        return visible(self, input_ids, visibility)

    return built


def with_step_lengths(change: Callable[..., str]) -> Callable[..., Any]:
    """The diffusion engine uses changed step lengths."""
    visible = network._NetworkGraph._visible

    def built(self: Any, step: str, visibility: str) -> Any:
        read = change(self, step, visibility) if self.pattern == "bidirectional" else visibility
        return visible(self, step, read)

    return built


def without_adapter(self: Any, attended: str, residual: str, layer: Any, _index: int) -> Any:
    return self._linear(attended, layer.o_proj, residual)


def merge_adapter(linear: Callable[..., Any]) -> Callable[..., Any]:
    """The adapter is merged into the weights, and so active in every pass."""

    def pooled(self: Any, *modules: str, **options: Any) -> Any:
        if not modules[0].endswith("o_proj"):
            return linear(self, *modules, **options)
        down, up = self._checkpoint.adapter_matrices(int(modules[0].split(".")[2]))
        merged = self._checkpoint.linear(modules[0]).to_float32().T + down @ up
        return raw_pool.PooledLinear(self._put(modules[0], merged))

    return pooled


def high_nibble_first(packed: np.ndarray) -> np.ndarray:
    return (packed << 4) | (packed >> 4)


def swap_packed(put: Callable[..., Any]) -> Callable[..., Any]:
    def putting(self: Any, name: str, array: np.ndarray, *rest: Any) -> Any:
        return put(self, name, high_nibble_first(array) if array.dtype == np.uint8 else array, *rest)

    return putting


def network_with(name: str, fault: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(network._NetworkGraph, name, fault)


# Each fault with the passes that it affects, directly or through the cache.
MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]]] = {
    "YaRN": (lambda patch: patch.setattr(network, "yarn_frequencies", plain_rope), PASSES),
    "query scaling": (network_with("_rotations", without_query_scaling(network._NetworkGraph._rotations)), PASSES),
    "causal mask": (network_with("_visible", one_token_further(network._NetworkGraph._visible)), PASSES),
    "block's last token unseen": (
        network_with("_visible", with_step_lengths(lambda self, _, lengths: self.op("Sub", lengths, [1]))),
        ("draft",),
    ),
    "padding seen": (network_with("_visible", with_step_lengths(lambda _self, step, _lengths: step)), ("draft",)),
    "adapter left off": (network_with("_o_proj", without_adapter), ("draft",)),
    "adapter in the commit": (
        lambda patch: patch.setattr(raw_pool._Writer, "linear", merge_adapter(raw_pool._Writer.linear)),
        PASSES,
    ),
    "packing order": (
        lambda patch: patch.setattr(raw_pool._Writer, "_put", swap_packed(raw_pool._Writer._put)),
        PASSES,
    ),
}


def build(checkpoint: Path, out: Path) -> Path:
    build_engine(Checkpoint(checkpoint), out, target=CpuTarget(activations="fp32", unpacked_bytes=0), top_k=768)
    return out


def test_the_engine_without_a_fault_is_within_the_bar(random_int4_engine: Path, reference: Any) -> None:
    assert max(distances(random_int4_engine, reference).values()) < PARITY


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_fault_is_detected(
    name: str, random_int4_checkpoint: Path, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, touched = MUTATIONS[name]
    plant(monkeypatch)
    found = distances(build(random_int4_checkpoint, tmp_path / "engine"), reference)
    assert min(found[name] for name in touched) > 10 * PARITY
    assert all(found[name] < PARITY for name in found.keys() - set(touched))


def text(engine: Path, mode: Any) -> list[int]:
    with LLM(engine) as llm:
        return (
            llm.generate(PROMPT, SamplingParams(mode=mode, max_tokens=MAX_TOKENS, **MODES[mode])).outputs[0].token_ids
        )


def expected(reference: Any, mode: str) -> list[int]:
    decode = {"ar": "ar_generate", "diffusion": "generate", "linear_spec": "linear_spec_generate"}[mode]
    ids, _ = getattr(reference, decode)(torch.tensor([PROMPT]), MAX_TOKENS, **MODES[mode])
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_the_runtime_without_a_fault_gives_the_references_text(
    mode: str, random_int4_engine: Path, reference: Any
) -> None:
    assert text(random_int4_engine, mode) == expected(reference, mode)


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("mode", MODES)
def test_a_block_one_row_off_changes_the_text(
    mode: str, shift: int, random_int4_engine: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = batching._arrays

    def off_by_one(*arguments: Any) -> Any:
        ids, rows, write = arrays(*arguments)
        return ids, rows, write + shift * (write > 0)

    monkeypatch.setattr(batching, "_arrays", off_by_one)
    assert text(random_int4_engine, mode) != expected(reference, mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_adapter_in_the_commit_changes_the_text(
    mode: str, random_int4_checkpoint: Path, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTATIONS["adapter in the commit"][0](monkeypatch)
    assert text(build(random_int4_checkpoint, tmp_path / "engine"), mode) != expected(reference, mode)
