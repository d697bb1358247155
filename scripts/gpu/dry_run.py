"""The engine parts of the GPU check without a GPU, so that no line of them is executed on one for the first time.

Everything is small. Engines are emitted as for a GPU, with kernels that are not compiled; a double of the driver
interprets them. Times have no meaning here, so the part that times passes computes nothing. PyTorch's meta device
replaces the GPU of the PyTorch reference; it shows whether a pass can be captured in a CUDA graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.gpu import bench_parts
from scripts.gpu.bench import kernel_records
from scripts.gpu.engine_emission import EmittedSizes, emit_engines, emit_timed_engine
from scripts.gpu.engine_times import TimedSizes, times_of_engine
from scripts.gpu.memcheck import run_every_mode
from scripts.gpu.random_weights import TIMED
from scripts.gpu.reference_times import times_of_reference
from scripts.gpu.step_bits import ComparedSteps, bits_of_steps
from scripts.gpu.token_check import tokens_of_tiny
from tests.support.interpreter_host import InterpreterHost
from tests.support.interpreting_gpu import TorchOnHost, interpreting_gpu
from tests.support.random_checkpoint import write_random_checkpoint
from tests.support.torch_on_meta import TorchOnMeta
from tests.support.uncompiled_kernels import UncompiledKernels
from trimode.build.gpu import kernel_network
from trimode.engine.manifest import Limits

SM, SPLITS = 121, 2
PROMPTS = ["abc"]
EMITTED = EmittedSizes(
    method="rtn",
    max_tokens=4,
    block=4,
    capacity=48,
    max_batch=1,
    max_step=16,
    shape="tiny",
    layers=1,
    vocabulary=384,
    timed=Limits(capacity=128, prefill_step=16, top_k=4, max_batch=2, max_step=16),
)
TIMES = TimedSizes(
    batches={16: (1, 2), 24: (1,)}, block=8, prefill=32, untimed=1, repeats=1, graph_repeats=1, replays=1
)
COMPARED = ComparedSteps(2, ((1, 2), (2, 1)))
PASSES = ((16, 1), (16, 4))
BENCH = bench_parts.BenchSizes(
    replace(TIMES, batches={16: (1,)}, prefill=16),
    ComparedSteps(5, ((1, 2), (2, 2))),
    requests=(1,),
    prompt_tokens=4,
    new_tokens=2,
    block=2,
)
Record = dict[str, Any]


def dry_engine_records(parts: Iterable[str]) -> Iterator[tuple[str, Record]]:
    """The records of these parts, each with its part."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with pytest.MonkeyPatch.context() as patch:
            compiler = UncompiledKernels(patch)
            # Few programs to interpret.
            patch.setattr(kernel_network, "SPLITS", SPLITS)
            checkpoint = write_random_checkpoint(
                folder / "random", hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=384
            )
            emit_engines(folder, SM, PROMPTS, checkpoint, EMITTED)
        for part in parts:
            real = torch.float32 if part.endswith("fp32") else torch.bfloat16
            with interpreting_gpu(compiler.kernels, real, computes=part != TIMED):
                for record in _records(part, folder):
                    yield part, record


def dry_bench(parts: Iterable[str]) -> Record:
    """The benchmark's report. Parts that only time something compute nothing."""
    records: dict[str, list[Record]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with pytest.MonkeyPatch.context() as patch:
            compiler = UncompiledKernels(patch)
            patch.setattr(kernel_network, "SPLITS", SPLITS)
            # ``auto`` may choose blocks of 32.
            limits = EMITTED.timed.model_copy(update={"max_step": 32})
            emit_timed_engine(folder, SM, replace(EMITTED, timed=limits))
            bench_parts.write_tokenizer(folder)
        for part in parts:
            with interpreting_gpu(compiler.kernels, torch.bfloat16, computes=part in ("bits", "requests")):
                records[part] = list(_bench_records(part, folder))
    states = dict.fromkeys(records, "ended")
    return {"date": "-", "command": "dry", "change": "-", "prediction": "-", "parts": states, "records": records}


def _bench_records(part: str, folder: Path) -> Iterable[Record]:
    if part == "device":
        return [{"card": "a double of the driver"}]
    if part in ("products", "variants"):
        return kernel_records(part, InterpreterHost(), small=True)
    return bench_parts.engine_records(part, folder, TorchOnHost(), BENCH)


def _records(part: str, folder: Path) -> Iterable[Record]:
    if part == "memcheck":
        run_every_mode(folder, prompts=1, max_tokens=2)
        return [{"what": "passes of memcheck", "memcheck": "executed without the tool"}]
    if part.startswith("tiny-"):
        return tokens_of_tiny(folder, part.removeprefix("tiny-"))
    if part.endswith("-bits"):
        return bits_of_steps(folder, TIMED, TorchOnHost(), COMPARED)
    if part.endswith("-reference"):
        return times_of_reference(folder, TIMED, TorchOnMeta(), PASSES)
    return times_of_engine(folder, TIMED, TorchOnHost(), TIMES)
