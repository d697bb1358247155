"""Engines that are divided among ranks compute the logits of the whole engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.random_checkpoint import write_random_checkpoint
from tests.support.rank_threads import RankThreads, in_order
from trimode.build.cpu.target import CpuTarget
from trimode.build.engine_builder import build_engine
from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.engine.targets.cpu import Activations
from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint
from trimode.runtime.cpu.cpu_executor import CpuExecutor
from trimode.runtime.executor import BidirectionalStep, CausalStep

PROMPT, BLOCK, MASK = 21, 8, 100
CLOSE = 1e-4  # of logits of the order of 10; the ranks add in another order


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 KV heads; every matrix int4, in groups of 32."""
    folder = tmp_path_factory.mktemp("ranks")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 16}
    write_random_checkpoint(folder / "checkpoint", **sizes)
    quantize_checkpoint(Checkpoint(folder / "checkpoint"), folder / "int4", method="rtn", group=32, head="int4")
    return folder / "int4"


def engine_of(
    checkpoint: Path, folder: Path, tp: int, unpacked_bytes: int = 16 << 20, activations: Activations = "fp32"
) -> Path:
    target = CpuTarget(activations=activations, unpacked_bytes=unpacked_bytes, tp=tp)
    build_engine(Checkpoint(checkpoint), folder / f"tp{tp}", target=target, top_k=300, capacity=128)
    return folder / f"tp{tp}"


def steps() -> list[CausalStep | BidirectionalStep]:
    """A prefill of two sequences, a causal and two bidirectional passes behind it; with masks and asked ids."""
    rng = np.random.default_rng(0)
    ids = rng.integers(101, 768, (2, PROMPT + BLOCK))
    every, at = np.tile(np.arange(BLOCK), (2, 1)), np.full(2, PROMPT)
    mask = rng.integers(0, 1 << 32, (2, BLOCK, 24), dtype=np.uint32)
    mask[0, 1] = mask[0, 2, 1:] = 0  # no legal token; legal tokens on one rank only
    blocks = np.full((2, BLOCK), MASK)
    blocks[:, 0] = ids[:, PROMPT]
    causal = CausalStep.chain(0, ids[:, PROMPT:], at, every)
    draft = BidirectionalStep.block(0, blocks, at, every, np.array([BLOCK, 5]), np.array([True, False]))
    return [
        CausalStep.chain(0, ids[:, :PROMPT], np.zeros(2, np.int64), np.full((2, 1), PROMPT - 1)),
        causal,
        replace(causal, top_k=1, asked_ids=rng.integers(0, 768, (2, BLOCK, 5))),
        replace(causal, token_mask=mask, top_k=7),
        draft,
        replace(draft, token_mask=mask, asked_ids=np.full((2, BLOCK, 1), MASK)),
    ]


def largest_error(ranks: RankThreads, whole: CpuExecutor) -> float:
    """Of logits, log-sum-exps and asked logits over all steps."""
    ranks.acquire(2)
    for _ in range(2):
        whole.pool.acquire()
    worst = 0.0
    for step in steps():
        found, expected = ranks.run(step), whole.run(step)
        assert found.tokens.shape == expected.tokens.shape
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None and one is not found.tokens:
                worst = max(worst, float(np.abs(one - other).max()))
        legal = expected.logits > -1e29
        assert (found.tokens == expected.tokens)[legal].mean() > 0.99
    return worst


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Path:
    return engine_of(checkpoint, checkpoint.parent, 1)


@pytest.mark.parametrize(("tp", "unpacked_bytes"), [(2, 16 << 20), (4, 16 << 20), (2, 0)])
def test_ranks_compute_the_candidates_of_the_whole_engine(
    tp: int, unpacked_bytes: int, checkpoint: Path, tmp_path: Path
) -> None:
    whole = engine_of(checkpoint, tmp_path, 1, unpacked_bytes)
    ranks = RankThreads(engine_of(checkpoint, tmp_path, tp, unpacked_bytes))
    assert largest_error(ranks, CpuExecutor(whole, Manifest.read(whole), threads=1)) < CLOSE


def test_a_missing_or_wrong_sum_is_noticed(checkpoint: Path, tmp_path: Path, whole: Path) -> None:
    engine = engine_of(checkpoint, tmp_path, 2)
    for add in (lambda parts: parts[0], lambda parts: in_order([*parts, parts[0]])):
        ranks = RankThreads(engine, add)
        with pytest.raises(AssertionError):
            assert largest_error(ranks, CpuExecutor(whole, Manifest.read(whole), threads=1)) < CLOSE


@pytest.mark.parametrize(("activations", "unpacked_bytes"), [("fp32", 16 << 20), ("int8", 0)])
def test_a_row_has_the_same_bits_in_every_pass(
    activations: Activations, unpacked_bytes: int, checkpoint: Path, tmp_path: Path
) -> None:
    """What self-speculation needs to emit the tokens of AR."""
    ranks = RankThreads(engine_of(checkpoint, tmp_path, 4, unpacked_bytes, activations))
    ranks.acquire(1)
    ids = np.random.default_rng(1).integers(101, 768, (1, 40))
    together = ranks.run(CausalStep.chain(0, ids, np.zeros(1, np.int64), np.arange(40)[None]))
    for at in (39, 17, 1):  # a pass may write a row of padding behind its own
        alone = ranks.run(CausalStep.chain(0, ids[:, at : at + 1], np.array([at]), np.zeros((1, 1), np.int64)))
        np.testing.assert_array_equal(alone.logits[0, 0], together.logits[0, at])


def test_the_parts_of_all_ranks_are_in_one_engine_directory(checkpoint: Path, tmp_path: Path) -> None:
    engine = engine_of(checkpoint, tmp_path, 4)
    manifest = Manifest.read(engine)
    assert manifest.ranks == 4
    files = {entry.path for entry in manifest.files}
    for rank in range(4):
        assert {f"rank{rank}/ar/model.2.onnx", f"rank{rank}/weights/adapter.safetensors"} <= files
    pools = {entry.bytes for entry in manifest.files if entry.path.endswith("pool.bin")}
    assert len(pools) == 1
    end = max(entry.offset + entry.bytes for entry in manifest.pool)
    assert end <= pools.pop()


@pytest.mark.parametrize(
    ("tp", "message"),
    [
        (3, "it has 8 KV heads, which is not a multiple of 3"),
        (16, "it has 8 KV heads, which is not a multiple of 16"),
    ],
)
def test_ranks_must_divide_the_kv_heads(tp: int, message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TriModeError, match=message):
        engine_of(checkpoint, tmp_path, tp)
    assert not list(tmp_path.iterdir())


def test_ranks_hold_whole_quantisation_groups(random_int4_checkpoint: Path, tmp_path: Path) -> None:
    """128 columns of o_proj in groups of 128 cannot be divided."""
    with pytest.raises(TriModeError, match=r"--tp 2 ranks: it has 128 columns of o_proj.* smaller --group than 128"):
        engine_of(random_int4_checkpoint, tmp_path, 2)
