"""The parts of the benchmark that run an engine of the 8B checkpoint's sizes with random weights.

Random weights accept no draft, so a cycle's time is measured here and its tokens are not.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from scripts.gpu import engine_times
from scripts.gpu.engine_times import Prepared, TimedSizes, kernels_of, passes_of, prefill_of, recording
from scripts.gpu.part_runner import Record
from scripts.gpu.random_weights import TIMED, RandomEngine, random_engine, randomise
from scripts.gpu.step_bits import ComparedSteps, bits_of_steps
from scripts.gpu.torch_device import TorchDevice
from trimode.engine.files import TOKENIZER
from trimode.engine.manifest import Manifest
from trimode.model.checkpoint import HEAD, linear_shapes
from trimode.model.config import ModelConfig
from trimode.model.tokenizer import Tokenizer
from trimode.runtime.api import llm as llm_module
from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.cuda.cuda_executor import CudaExecutor
from trimode.runtime.cuda.cuda_network import CudaNetwork
from trimode.runtime.executor import Executor, Step
from trimode.runtime.gpu.device import Device, Graph
from trimode.runtime.loading import LoadedEngine
from trimode.runtime.request.sampling_params import SamplingParams


@dataclass(frozen=True)
class BenchSizes:
    """timed: of passes and prefill. compared: the text of part ``bits``. requests: numbers of requests at the
    same time, each with so many prompt_tokens and new tokens. block: of modes with blocks.
    """

    timed: TimedSizes
    compared: ComparedSteps
    requests: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    block: int

    @property
    def modes(self) -> tuple[Record, ...]:
        blocks = {"block_length": self.block}
        return {"mode": "ar"}, {"mode": "linear_spec", **blocks}, {"mode": "diffusion", **blocks}, {"mode": "auto"}


SIZES_8B = BenchSizes(
    replace(engine_times.SIZES_8B, batches={512: (1,), 4096: (1,)}),
    # The steps with most tokens first: they take the least time.
    ComparedSteps(10_000, ((1, 64), (1, 32), (1, 8), (16, 64), (16, 32), (16, 8), (16, 1))),
    requests=(1, 64),
    prompt_tokens=128,
    new_tokens=32,
    block=32,
)


def engine_records(part: str, folder: Path, torch_device: TorchDevice, sizes: BenchSizes) -> Iterator[Record]:
    """The records of one part: ``passes``, ``bits``, ``prefill`` or ``requests``."""
    if part == "bits":
        yield from bits_of_steps(folder, TIMED, torch_device, sizes.compared)
        return
    parts = {"passes": _passes, "prefill": _prefill, "requests": _requests}
    with random_engine(folder / "engines" / TIMED, torch_device) as engine:
        yield from parts[part](engine, torch_device, sizes)


@contextmanager
def _executor(
    engine: RandomEngine, torch_device: TorchDevice, capacity: int, max_batch: int
) -> Iterator[tuple[CudaExecutor, LoadedEngine]]:
    """The engine with other limits and random KV rows. Its memory is free again afterwards."""
    limits = engine.manifest.limits.model_copy(update={"capacity": capacity, "max_batch": max_batch})
    sized = engine.manifest.model_copy(update={"limits": limits})
    executor = CudaExecutor(engine.folder, sized, engine.device, engine.weights)
    randomise(torch_device, executor.pool.memory)
    yield executor, LoadedEngine(sized, Tokenizer.from_folder(engine.folder / TOKENIZER), executor)
    del executor
    gc.collect()


def _passes(engine: RandomEngine, torch_device: TorchDevice, sizes: BenchSizes) -> Iterator[Record]:
    """One request: AR, draft, verification and cycle, and the kernels of each pass."""
    timed = sizes.timed
    embedding = next(entry.bytes for entry in engine.manifest.pool if entry.name == "encoder.embed_tokens")
    for rows, batches in timed.batches.items():
        prepared: Prepared = {}
        with (
            patch.object(CudaNetwork, "prepare", recording(prepared)),
            _executor(engine, torch_device, rows + 4 * timed.block, max(batches)) as (executor, _),
        ):
            for batch in batches:
                yield from passes_of(TIMED, executor, timed, rows, batch, engine.weights.size - embedding)
            for bucket, launches in prepared.items():
                yield from kernels_of(TIMED, engine.device, timed, bucket, launches, rows)
            prepared.clear()


def _prefill(engine: RandomEngine, torch_device: TorchDevice, sizes: BenchSizes) -> Iterator[Record]:
    with _executor(engine, torch_device, sizes.timed.prefill + sizes.timed.block, 1) as (executor, _):
        record = prefill_of(TIMED, executor, sizes.timed, engine.manifest)
    yield {**record, "flops": prefill_flops(engine.manifest.model, sizes.timed.prefill)}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer for the engine without weights in ``folder``, whose requests are token ids."""
    from tests.support.random_checkpoint import write_random_tokenizer

    engine = folder / "engines" / TIMED
    (engine / TOKENIZER).mkdir(exist_ok=True)
    write_random_tokenizer(engine / TOKENIZER, Manifest.read(engine).model.vocab_size)


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Of the matrices and of causal attention. Only the last token of a step has logits, so the head is not counted."""
    weights = sum(out * inner for name, (out, inner) in linear_shapes(config).items() if name != HEAD)
    attention = 2 * tokens * tokens * config.query_width * config.num_hidden_layers
    return 2 * weights * tokens + attention


def _requests(engine: RandomEngine, torch_device: TorchDevice, sizes: BenchSizes) -> Iterator[Record]:
    """Tokens a second of requests that run at the same time, by mode. For ``auto``, the passes show what it chose."""
    capacity, largest = sizes.prompt_tokens + sizes.new_tokens + 2 * sizes.block, max(sizes.requests)
    rng = np.random.default_rng(3)
    prompts = rng.integers(101, engine.manifest.model.vocab_size, (largest, sizes.prompt_tokens))
    inputs = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
    with _executor(engine, torch_device, capacity, largest) as (_, loaded):
        with patch.object(llm_module, "load_engine", lambda *_arguments, **_options: loaded):
            llm = EngineLLM(engine.folder, max_batch_size=largest, prefix_cache_bytes=0, verify=False)
        with _frozen_heap(), llm:
            for requests, mode in product(sizes.requests, sizes.modes):
                params = SamplingParams(max_tokens=sizes.new_tokens, ignore_eos=True, **mode)
                llm.generate(inputs[:requests], params)  # captures the passes
                before = llm.stats()
                with _recorded(loaded.executor) as passes:
                    started = time.perf_counter()
                    outputs = llm.generate(inputs[:requests], params)
                    seconds = time.perf_counter() - started
                after, emitted = llm.stats(), sum(len(output.outputs[0].token_ids) for output in outputs)
                yield {
                    "what": f"{TIMED}: {requests} requests, {mode['mode']}",
                    "tokens": emitted,
                    "tokens_per_second": emitted / seconds,
                    "counts": {
                        name: value - getattr(before.counts, name) for name, value in vars(after.counts).items()
                    },
                    "seconds": seconds,
                    "passes": list(passes.values()),
                }


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """As in `trimode serve`: torch's objects make a collection long."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _recorded(executor: Executor) -> Iterator[dict[str, Record]]:
    """The calls of the executor, by kind, batch and tokens of a sequence: how many, their seconds, and how many graphs
    were captured in them.
    """
    passes: dict[str, Record] = {}
    captured = 0
    capture = Device.capture

    def counted(device: Device, enqueue: Callable[[], None]) -> Graph:
        nonlocal captured
        captured += 1
        return capture(device, enqueue)

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(step: Step, *arguments: Any, **options: Any) -> Any:
            captured_before, started = captured, time.perf_counter()
            result = call(step, *arguments, **options)
            seconds = time.perf_counter() - started
            what = f"{call.__name__} {type(step).__name__}, {step.batch} x {step.input_ids.shape[1]}"
            record = passes.setdefault(what, {"what": what, "calls": 0, "seconds": 0.0, "captured": 0})
            record["calls"] += 1
            record["seconds"] += seconds
            record["captured"] += captured - captured_before
            return result

        return timing

    with (
        patch.object(Device, "capture", counted),
        patch.object(executor, "run", timed(executor.run)),
        patch.object(executor, "speculate", timed(executor.speculate)),
    ):
        yield passes
