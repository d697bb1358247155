"""A token's logits and KV rows have the same bits in steps of any length and in batches, through whole passes.

A text is read in one step of 64 tokens. Then its tokens are read again, behind the same KV rows, in steps of 1, 8, 32
and 64 tokens, alone and between 15 other sequences. Each must give the logits and write the KV rows of the first step.
So a text has the same bits however it is divided.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.input_scales import write_input_scales
from tests.support.interpreting_gpu import interpreting_gpu
from tests.support.random_checkpoint import write_random_checkpoint
from tests.support.uncompiled_kernels import UncompiledKernels
from trimode.build.cuda.target import CudaTarget
from trimode.build.engine_builder import build_engine
from trimode.build.gpu import kernel_network
from trimode.engine.launch_list import LaunchList
from trimode.model.checkpoint import Checkpoint
from trimode.plugins.operators import int4_product
from trimode.quantize import quantize_checkpoint
from trimode.runtime.cuda.cuda_executor import CudaExecutor
from trimode.runtime.executor import CausalStep
from trimode.runtime.loading import load_engine

LENGTH, BATCH, CAPACITY, VOCABULARY, TOP_K = 64, 16, 80, 384, 4
Bits = NDArray[np.uint32]


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaExecutor]:
    """One layer in bf16, all matrices int4, with AWQ's input scales. Attention has two splits. K of down_proj is summed
    in two parts, which is done for longer ones only.
    """
    folder = tmp_path_factory.mktemp("bits")
    write_random_checkpoint(
        folder / "random", hidden_size=64, intermediate_size=256, num_hidden_layers=1, vocab_size=VOCABULARY
    )
    quantize_checkpoint(Checkpoint(folder / "random"), folder / "int4", method="rtn", group=64, head="int4")
    target = CudaTarget(sms=(121,), dtype="bf16", max_batch=BATCH, max_step=LENGTH)
    with pytest.MonkeyPatch.context() as patch:
        compiler = UncompiledKernels(patch)
        patch.setattr(kernel_network, "SPLITS", 2)
        patch.setattr(int4_product, "_LEAST_SPLIT", 128)
        checkpoint = Checkpoint(write_input_scales(folder / "int4", folder / "awq"))
        build_engine(checkpoint, folder / "cuda", target=target, capacity=CAPACITY, top_k=TOP_K)
        operators = {launch.operator for launch in LaunchList.read(folder / "cuda" / "ar").launches}
        assert {"Int4ProductSplitResidualForNorm", "Int4HeadNormed", "AttendMasked", "MergeSplitsScaled"} <= operators
        patch.undo()
        patch.setattr(int4_product, "_LEAST_SPLIT", 128)
        with interpreting_gpu(compiler.kernels, torch.bfloat16):
            yield _with_sequences(folder / "cuda")


def _with_sequences(engine: Path) -> CudaExecutor:
    """The engine's executor, all of whose slots are active."""
    executor = load_engine(engine, verify=False).executor
    assert isinstance(executor, CudaExecutor)
    while executor.pool.active < BATCH:
        executor.pool.acquire()
    return executor


def kv_rows(executor: CudaExecutor, slot: int) -> list[NDArray[np.uint16]]:
    """The KV rows of a slot as bits, [heads, rows, head dim] each. They are the device's memory."""
    config = executor._manifest.model
    shape = (config.num_key_value_heads, CAPACITY, config.head_dim)
    count = int(np.prod(shape))
    places = (executor.pool.address(cache, slot) for cache in range(2 * config.num_hidden_layers))
    return [np.frombuffer((ctypes.c_uint16 * count).from_address(place), np.uint16).reshape(shape) for place in places]


def results_of(
    executor: CudaExecutor, ids: NDArray[np.int64], starts: NDArray[np.int64], sequence: int, top_k: int
) -> Bits:
    """Log-sum-exp and candidates' logits of one sequence's rows, as bits."""
    rows = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    found = executor.run(CausalStep.chain(0, ids, starts, rows, top_k=top_k))
    numbers = np.concatenate([found.log_sum_exp[sequence][:, None], found.logits[sequence]], axis=-1)
    return np.ascontiguousarray(numbers).view(np.uint32)


@pytest.fixture(scope="module")
def text(executor: CudaExecutor) -> tuple[NDArray[np.int64], Bits, list[NDArray[np.uint16]]]:
    """Tokens, their results in one step, and the KV rows that it wrote."""
    ids = np.random.default_rng(0).integers(101, VOCABULARY, (1, LENGTH))
    results = results_of(executor, ids, np.zeros(1, int), 0, TOP_K)
    assert len(np.unique(results, axis=0)) == LENGTH
    return ids[0], results, [rows[:, :LENGTH].copy() for rows in kv_rows(executor, 0)]


@pytest.mark.parametrize(
    ("batch", "step", "starts"),
    [
        (1, 1, (0, 32, 63)),
        (1, 8, (0, 13)),
        (1, 32, (17,)),
        (BATCH, 1, (33,)),
        (BATCH, 8, (29,)),
        (BATCH, 32, (32,)),
        (BATCH, 64, (0,)),
    ],
)
def test_a_texts_bits_depend_neither_on_steps_nor_on_batches(
    executor: CudaExecutor,
    text: tuple[NDArray[np.int64], Bits, list[NDArray[np.uint16]]],
    batch: int,
    step: int,
    starts: tuple[int, ...],
) -> None:
    """The other sequences have other tokens, lengths and KV rows."""
    tokens, results, written = text
    rng, sequence = np.random.default_rng(step), batch // 3
    for start in starts:
        others = rng.integers(0, CAPACITY - step + 1, batch)
        ids = rng.integers(101, VOCABULARY, (batch, step))
        for slot in range(batch):
            for cache in kv_rows(executor, slot):
                cache[:] = 0x3F80 + rng.integers(0, 64, cache.shape)  # between 1 and 1.5
        ids[sequence], others[sequence] = tokens[start : start + step], start
        for cache, rows in zip(kv_rows(executor, sequence), written, strict=True):
            cache[:, :start] = rows[:, :start]
        # The log-sum-exp is of all logits. One candidate is interpreted sooner.
        top_k = TOP_K if batch == 1 else 1
        found = results_of(executor, ids, others, sequence, top_k)
        np.testing.assert_array_equal(found, results[start : start + step, : 1 + top_k])
        for cache, rows in zip(kv_rows(executor, sequence), written, strict=True):
            np.testing.assert_array_equal(cache[:, : start + step], rows[:, : start + step])
