"""The parts of the GPU check that run whole engines: tokens of the shipped checkpoint, and times at published sizes."""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from trimode.engine.files import ADAPTER
from trimode.engine.launch_list import LaunchList, LaunchTensor
from trimode.engine.manifest import Manifest
from trimode.model.step import adapter_inputs
from trimode.plugins.launches import PlannedLaunch
from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.cuda.cuda_executor import CudaExecutor
from trimode.runtime.cuda.cuda_network import CudaNetwork
from trimode.runtime.executor import BidirectionalStep, CausalStep
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device import BoundLaunch, Buffer, Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.request.sampling_params import SamplingParams

MASK = 100
BLOCK = 32
PREFILL = 2048
# Tokens of the text whose logits are compared bit for bit.
BITS = 1024
REPEATS = 20
# KV rows and batches of the timed passes; for each number of rows, the engine has slots for the largest batch.
TIMED = {512: (1, 4, 16), 4096: (1, 4, 16), 32768: (1,)}
Record = dict[str, Any]


def tokens_of_tiny(folder: Path, real: str) -> Iterator[Record]:
    """Tokens of every mode against those of target cpu. Unused rows of the KV pool hold NaN."""
    expected = json.loads((folder / "expected.json").read_text())
    found: dict[str, list[list[int]]] = {}
    with patch.object(DeviceKvPool, "__init__", _poisoned), EngineLLM(folder / "engines" / f"tiny-{real}") as llm:
        for options in expected["modes"]:
            params, mode = SamplingParams(max_tokens=expected["max_tokens"], **options), str(options["mode"])
            outputs = llm.generate(expected["messages"], params)
            found[mode] = [output.outputs[0].token_ids for output in outputs]
            yield _comparison(f"tiny-{real}, {mode}: tokens of target cpu", found[mode], expected["tokens"][mode])
    yield _comparison(f"tiny-{real}: linear_spec emits the tokens of ar", found["linear_spec"], found["ar"])


_plain_init = DeviceKvPool.__init__


def _poisoned(pool: DeviceKvPool, device: Device, *arguments: Any) -> None:
    _plain_init(pool, device, *arguments)
    device.fill(pool.memory.address, 0xFF, pool.memory.size)
    device.synchronize()


def _comparison(what: str, found: list[list[int]], expected: list[list[int]]) -> Record:
    different = [
        {
            "answer": index,
            "first": next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), -1),
        }
        for index, (one, other) in enumerate(zip(found, expected, strict=True))
        if one != other
    ]
    return {"what": what, "equal": len(found) - len(different), "of": len(found), "different": different}


def times_of_engine(folder: Path, shape: str) -> Iterator[Record]:
    """Milliseconds of passes and cycles, and of each kernel of a pass, with random weights."""
    source = folder / "engines" / shape
    with tempfile.TemporaryDirectory() as scratch:
        engine = Path(shutil.copytree(source, Path(scratch, "engine")))
        manifest = Manifest.read(engine)
        _write_random_adapter(engine, manifest)
        device = Device(0)
        weights = _random_weights(device, engine, manifest)
        read_bytes = weights.size - next(entry.bytes for entry in manifest.pool if entry.name == "encoder.embed_tokens")
        for rows, batches in TIMED.items():
            limits = manifest.limits.model_copy(update={"capacity": rows + 4 * BLOCK, "max_batch": max(batches)})
            if rows <= PREFILL < max(TIMED):
                limits = limits.model_copy(update={"capacity": PREFILL + 4 * BLOCK})
            sized = manifest.model_copy(update={"limits": limits})
            prepared: dict[Bucket, list[tuple[PlannedLaunch, BoundLaunch]]] = {}
            with patch.object(CudaNetwork, "prepare", _recording(prepared)):
                started = time.perf_counter()
                executor = CudaExecutor(engine, sized, device, weights)
                _randomise(executor.pool.memory)
                memory = {"weights": weights.size, "kv": executor.pool.limit_bytes, "activations": executor.arena_bytes}
                yield {"what": f"{shape}: loaded", "seconds": time.perf_counter() - started, "bytes": memory}
                for batch in batches:
                    yield from _passes(shape, executor, rows, batch, read_bytes, manifest.model.vocab_size)
                    if batch == 1:
                        for bucket, launches in list(prepared.items()):
                            if bucket.batch == 1:
                                yield from _kernels(shape, device, bucket, launches, rows)
                        prepared.clear()
                if rows == min(TIMED):
                    yield _prefill(shape, executor, sized)
                    yield from _bits_of_steps(shape, executor, manifest.model.vocab_size)
            del executor
            gc.collect()
            if rows < max(TIMED):
                for early_rows in (0, BLOCK):
                    with patch.object(CudaNetwork, "early_rows", early_rows):
                        executor = CudaExecutor(engine, sized, device, weights)
                        yield from _passes(shape, executor, rows, 1, read_bytes, manifest.model.vocab_size)
                    del executor
                    gc.collect()


def _recording(prepared: dict[Bucket, list[tuple[PlannedLaunch, BoundLaunch]]]) -> Callable[..., Any]:
    original = CudaNetwork.prepare

    def prepare(network: CudaNetwork, bucket: Bucket, *tensors: Any) -> list[tuple[PlannedLaunch, BoundLaunch]]:
        prepared[bucket] = original(network, bucket, *tensors)
        return prepared[bucket]

    return prepare


def _passes(shape: str, executor: CudaExecutor, rows: int, batch: int, read: int, vocabulary: int) -> Iterator[Record]:
    while executor.pool.active < batch:
        executor.pool.acquire()
    rng, committed = np.random.default_rng(0), np.full(batch, rows)
    one = CausalStep.chain(0, rng.integers(101, vocabulary, (batch, 1)), committed, np.zeros((batch, 1), int), top_k=1)
    ids = np.full((batch, BLOCK), MASK)
    ids[:, 0] = 300
    all_rows = np.tile(np.arange(BLOCK), (batch, 1))
    draft = BidirectionalStep.block(
        0, ids, committed, all_rows, np.full(batch, BLOCK), np.ones(batch, np.bool_), top_k=1
    )
    verify = draft.verification(top_k=1)
    kv = batch * rows * executor.pool.row_bytes
    for what, run, passes in (
        ("ar pass", lambda: executor.run(one), 1),
        ("draft", lambda: executor.run(draft), 1),
        ("verify", lambda: executor.run(verify), 1),
        ("cycle", lambda: executor.speculate(draft, 1), 2),
    ):
        times = _wall_times(run)
        yield {
            "what": f"{shape}: {what}",
            "rows": rows,
            "batch": batch,
            "ms": statistics.median(times),
            "fastest_ms": min(times),
            "least_bytes": passes * (read + kv),
            "early_rows": CudaNetwork.early_rows,
        }


def _wall_times(run: Callable[[], object]) -> list[float]:
    """Milliseconds of each run, after three others."""
    times = []
    for repeat in range(3 + REPEATS):
        started = time.perf_counter()
        run()
        if repeat >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    return times


def _kernels(
    shape: str, device: Device, bucket: Bucket, launches: list[tuple[PlannedLaunch, BoundLaunch]], rows: int
) -> Iterator[Record]:
    """Microseconds of the launches of each kernel in a pass, as a CUDA graph of these launches alone.

    Launches over several layers read other weights each time, as in a pass.
    """
    groups: dict[str, list[BoundLaunch]] = defaultdict(list)
    for planned, launch in launches:
        sizes = planned.operator.constants(planned.node)
        name = ".".join((planned.operator.name, *(f"{key}{value}" for key, value in sizes.items())))
        groups[name].append(launch)
    total = _graph_microseconds(device, [launch for _, launch in launches])
    record = {"rows": rows, "batch": bucket.batch, "step": bucket.step, "kind": bucket.kind.__name__}
    yield {"what": f"{shape}: kernels of a pass", **record, "launches": len(launches), "microseconds": total}
    for name, members in groups.items():
        took = _graph_microseconds(device, members)
        grid = members[0].grid
        yield {"what": name, **record, "launches": len(members), "microseconds": took, "grid": grid}


def _graph_microseconds(device: Device, launches: list[BoundLaunch]) -> float:
    def enqueue() -> None:
        for launch in launches:
            device.launch_kernel(launch)

    graph, times = device.capture(enqueue), []
    for repeat in range(7):
        started = time.perf_counter()
        for _ in range(5):
            device.launch(graph)
        device.synchronize()
        if repeat:
            times.append(1e6 * (time.perf_counter() - started) / 5)
    return statistics.median(times)


def _prefill(shape: str, executor: CudaExecutor, manifest: Manifest) -> Record:
    """A prompt of PREFILL tokens in steps of the engine's prefill_step."""
    size, rng = manifest.limits.prefill_step, np.random.default_rng(1)

    def run() -> None:
        for start in range(0, PREFILL, size):
            ids = rng.integers(101, manifest.model.vocab_size, (1, size))
            executor.run(CausalStep.chain(0, ids, np.array([start]), np.array([[size - 1]]), top_k=1))

    run()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return {"what": f"{shape}: prefill of {PREFILL} tokens", "step": size, "ms": statistics.median(times)}


def _bits_of_steps(shape: str, executor: CudaExecutor, vocabulary: int) -> Iterator[Record]:
    """Logits of a text that is read in steps of other lengths and in a batch, against steps of one token."""
    text = np.random.default_rng(2).integers(101, vocabulary, BITS)
    alone = _logits(executor, text, 1, 1)
    for batch, step in ((1, 8), (1, 32), (1, 64), (4, 8), (16, 4)):
        equal = (_logits(executor, text, batch, step) == alone).all(axis=-1)
        yield {
            "what": f"{shape}: logits in steps of {step}, batch {batch}, with the bits of steps of 1",
            "equal": int(equal.sum()),
            "of": BITS,
            "different": np.flatnonzero(~equal)[:5].tolist(),
        }


def _logits(executor: CudaExecutor, text: NDArray[np.int64], batch: int, step: int) -> NDArray[np.uint32]:
    """Of the last sequence of the batch, which all have this text: candidates and log-sum-exp, as bits."""
    found = []
    for start in range(0, len(text), step):
        ids = np.tile(text[start : start + step], (batch, 1))
        rows = np.tile(np.arange(step), (batch, 1))
        candidates = executor.run(CausalStep.chain(0, ids, np.full(batch, start), rows))
        found.append(np.concatenate([candidates.logits[-1], candidates.log_sum_exp[-1][:, None]], axis=-1))
    return np.concatenate(found).view(np.uint32)


# Random weights.


class _DeviceArray:
    """Device memory as an array that torch can take."""

    def __init__(self, address: int, kind: str, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "typestr": kind, "shape": shape, "version": 3}


def _tensor(address: int, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.as_tensor(_DeviceArray(address, kind, shape), device="cuda")


def _random_weights(device: Device, engine: Path, manifest: Manifest) -> Buffer:
    """A pool of random weights; norms are ones, and the kernels' constants are those of the network."""
    end = max(entry.offset + entry.bytes for entry in manifest.pool)
    buffer = device.allocate(end, "the weights")
    constants = dict(np.load(engine / "constants.npz"))
    weights = {tensor.name: tensor for tensor in LaunchList.read(engine / "ar").weights}
    torch.manual_seed(0)
    for entry in manifest.pool:
        _fill(buffer.address + entry.offset, weights[entry.name], constants)
    torch.cuda.synchronize()
    return buffer


def _fill(address: int, weight: LaunchTensor, constants: dict[str, Any]) -> None:
    shape = weight.sizes({})
    if weight.name in constants:
        _tensor(address, "<f4", shape).copy_(torch.from_numpy(constants[weight.name]))
    elif weight.type == "int32":
        words = _tensor(address, "<i4", shape)
        words.random_(-(1 << 31), (1 << 31) - 1)
    elif weight.type == "fp32":
        _tensor(address, "<f4", shape).uniform_(0.002, 0.006)
    else:
        real = _tensor(address, "<i2", shape).view(torch.bfloat16)
        if "norm" in weight.name:
            real.fill_(1.0)
        else:
            real.normal_(0, 0.02)


def _randomise(memory: Buffer) -> None:
    pool = _tensor(memory.address, "<i2", (memory.size // 2,)).view(torch.bfloat16)
    for part in pool.split(1 << 28):
        part.normal_()
    torch.cuda.synchronize()


def _write_random_adapter(engine: Path, manifest: Manifest) -> None:
    if manifest.adapter is None:
        return
    model, rank, rng = manifest.model, manifest.adapter.rank, np.random.default_rng(0)
    tensors = {}
    for index in range(model.num_hidden_layers):
        down, up = adapter_inputs(index)
        tensors[down] = rng.standard_normal((model.query_width, rank), np.float32) * np.float32(0.02)
        tensors[up] = rng.standard_normal((rank, model.hidden_size), np.float32) * np.float32(0.02)
    (engine / ADAPTER).parent.mkdir(exist_ok=True)
    save_file(tensors, engine / ADAPTER)
