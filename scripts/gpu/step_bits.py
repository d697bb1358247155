"""The part of the GPU check that compares logits of steps of several lengths, and of batches, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scripts.gpu.random_weights import random_engine
from scripts.gpu.torch_device import TorchDevice
from trimode.runtime.cuda.cuda_executor import CudaExecutor
from trimode.runtime.executor import CausalStep

Record = dict[str, Any]


class ComparedSteps(NamedTuple):
    """length: tokens of the text. steps: batch and tokens of the steps that read it."""

    length: int
    steps: tuple[tuple[int, int], ...]


STEPS_8B = ComparedSteps(1024, ((1, 8), (1, 32), (1, 64), (4, 8), (16, 4)))


def bits_of_steps(folder: Path, shape: str, torch_device: TorchDevice, compared: ComparedSteps) -> Iterator[Record]:
    """Logits of a text that is read in steps of other lengths and in a batch, against steps of one token."""
    with random_engine(folder / "engines" / shape, torch_device) as (engine, manifest, device, weights):
        largest = max(batch for batch, _ in compared.steps)
        limits = manifest.limits.model_copy(update={"capacity": compared.length, "max_batch": largest})
        executor = CudaExecutor(engine, manifest.model_copy(update={"limits": limits}), device, weights)
        while executor.pool.active < largest:
            executor.pool.acquire()
        text = np.random.default_rng(2).integers(101, manifest.model.vocab_size, compared.length)
        alone = _logits(executor, text, 1, 1)
        for batch, step in compared.steps:
            equal = (_logits(executor, text, batch, step) == alone).all(axis=-1)
            yield {
                "what": f"{shape}: logits in steps of {step}, batch {batch}, with the bits of steps of 1",
                "equal": int(equal.sum()),
                "of": compared.length,
                "different_rows": np.flatnonzero(~equal)[:5].tolist(),
            }


def _logits(executor: CudaExecutor, text: NDArray[np.int64], batch: int, step: int) -> NDArray[np.uint32]:
    """Of the last sequence of the batch, which all have this text: candidates and log-sum-exp, as bits."""
    found = []
    for start in range(0, len(text), step):
        ids = np.tile(text[start : start + step], (batch, 1))
        rows = np.tile(np.arange(ids.shape[1]), (batch, 1))  # the last step may be shorter
        candidates = executor.run(CausalStep.chain(0, ids, np.full(batch, start), rows))
        found.append(np.concatenate([candidates.logits[-1], candidates.log_sum_exp[-1][:, None]], axis=-1))
    return np.concatenate(found).view(np.uint32)
