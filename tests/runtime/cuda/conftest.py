"""A small random checkpoint built for targets cuda and cpu, and a machine whose GPU is a double that interprets the
kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
import torch

from tests.support.driver_double import DriverDouble, LibcudaDouble
from tests.support.executor_cases import StepCases
from tests.support.input_scales import write_input_scales
from tests.support.random_checkpoint import write_random_checkpoint
from tests.support.uncompiled_kernels import UncompiledKernels
from trimode.build.cpu.target import CpuTarget
from trimode.build.cuda.target import CudaTarget
from trimode.build.engine_builder import build_engine
from trimode.build.gpu import kernel_network
from trimode.build.gpu.kernel_emission import NeededKernel
from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint
from trimode.runtime.gpu import device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool

CAPACITY, MAX_BATCH, MAX_STEP, VOCABULARY, TOP_K = 48, 4, 16, 384, 4
CASES = StepCases(lengths=(7, 3, 5), blocks=(4, 2, 3), max_step=MAX_STEP, capacity=CAPACITY, vocabulary=VOCABULARY)


class Engines(NamedTuple):
    """One checkpoint built for targets cuda and cpu. kernels: of the engine for cuda, by their PTX and cubin."""

    checkpoint: Path
    cuda: Path
    cpu: Path
    kernels: dict[bytes, NeededKernel]


class Gpu(Protocol):
    def __call__(self, engines: Engines, *, computes: bool = True) -> DriverDouble: ...


def build_engines(checkpoint: Path, folder: Path, target: CudaTarget, capacity: int) -> Engines:
    """Both engines. The one for cuda has few splits and large tiles, so that few programs are interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        compiler = UncompiledKernels(patch)
        patch.setattr(kernel_network, "SPLITS", 2)
        patch.setattr(kernel_network, "_smallest_tiles", _large_tiles)
        build_engine(Checkpoint(checkpoint), folder / "cuda", target=target, capacity=capacity, top_k=TOP_K)
    exact = CpuTarget(activations="fp32")
    build_engine(
        Checkpoint(checkpoint),
        folder / "cpu",
        target=exact,
        capacity=capacity,
        top_k=TOP_K,
        prefill_step=target.max_step,
    )
    return Engines(checkpoint, folder / "cuda", folder / "cpu", compiler.kernels)


def _large_tiles(needed: Mapping[str, NeededKernel]) -> dict[str, NeededKernel]:
    """One tactic of each kernel: of up to 32 rows, which hold most passes of the tests, the one with most columns."""

    def area(name: str) -> tuple[bool, int, int]:
        constants = needed[name].tactic.constants
        rows = constants.get("BLOCK_M", 0)
        return rows <= 32, rows, constants.get("BLOCK_N", 0)

    largest: dict[str, str] = {}
    for name in sorted(needed, key=area, reverse=True):
        largest.setdefault(name.rpartition(".")[0], name)
    return {name: needed[name] for name in largest.values()}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """int4 with AWQ's input scales and a 16-bit head, two layers; the type of target cuda is fp32, so that results can
    be compared closely.
    """
    folder = tmp_path_factory.mktemp("small")
    write_random_checkpoint(
        folder / "random", hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=VOCABULARY
    )
    quantize_checkpoint(Checkpoint(folder / "random"), folder / "int4", method="rtn", group=32)
    target = CudaTarget(sms=(121,), dtype="fp32", max_batch=MAX_BATCH, max_step=MAX_STEP)
    return build_engines(write_input_scales(folder / "int4", folder / "awq"), folder, target, CAPACITY)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Gives this machine a GPU of compute capability 12.1 that interprets an engine's kernels, or only checks their
    launches. Unused rows of its KV pool hold NaN.
    """
    init = DeviceKvPool.__init__

    def poisoned(self: DeviceKvPool, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        ctypes.memset(self.address(0, 0), 0xFF, self.limit_bytes)

    monkeypatch.setattr(DeviceKvPool, "__init__", poisoned)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: LibcudaDouble())

    def install(engines: Engines, *, computes: bool = True) -> DriverDouble:
        driver = DriverDouble(kernels=engines.kernels, real=torch.float32, computes=computes)
        monkeypatch.setattr(device, "driver", driver)
        return driver

    return install
