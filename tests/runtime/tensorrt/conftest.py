"""One checkpoint built for targets tensorrt and cpu, and a machine whose GPU and TensorRT are doubles."""

from __future__ import annotations

import ctypes
import importlib
import shutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from tests.support.driver_double import DriverDouble, LibcudaDouble
from tests.support.tensorrt_double import TensorrtDouble
from tests.support.tensorrt_runtime_double import TrtRuntimeDouble
from tests.support.uncompiled_kernels import UncompiledKernels
from trimode.build.engine_builder import build_engine
from trimode.build.gpu.kernel_network import write_pool_and_kernels
from trimode.build.tensorrt import compiled_directory
from trimode.build.tensorrt.emission import write_graphs
from trimode.build.tensorrt.target import TensorrtTarget
from trimode.common.gpus import find_gpus
from trimode.common.progress import no_progress
from trimode.engine.files import POOL, hash_file
from trimode.engine.manifest import Manifest
from trimode.engine.targets.tensorrt import GRAPH, Operators
from trimode.model.checkpoint import Checkpoint
from trimode.model.step import ENGINES
from trimode.plugins.operators import int4_product
from trimode.quantize import quantize_checkpoint
from trimode.runtime.gpu import device

CAPACITY, MAX_BATCH, MAX_STEP, LEAST_SPLIT = 512, 4, 80, 64


class Engines(NamedTuple):
    """One checkpoint built for targets tensorrt and cpu. emitted: before the plans were compiled. graphs: that the
    double executes, by the hash of the graph that was compiled.
    """

    emitted: Path
    tensorrt: Path
    cpu: Path
    graphs: dict[str, Path]


@pytest.fixture(scope="session")
def fp16(tensorrt: ModuleType, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Built and compiled as for users, with products split that are too short for it. The double runs the graphs of the
    engine directory.
    """
    folder = tmp_path_factory.mktemp("tensorrt_fp16")
    quantize_checkpoint(Checkpoint(tiny_checkpoint), folder / "int4", method="rtn", group=64)
    checkpoint = Checkpoint(folder / "int4")
    options = TensorrtTarget(sms=(121,), dtype="fp16", max_batch=MAX_BATCH, max_step=MAX_STEP, emit_only=True)
    with pytest.MonkeyPatch.context() as patch:
        UncompiledKernels(patch)
        patch.setattr(int4_product, "_LEAST_SPLIT", LEAST_SPLIT)
        patch.setattr(ctypes, "CDLL", lambda _name: LibcudaDouble())
        patch.setattr(compiled_directory, "find_gpus", find_gpus)
        TensorrtDouble(tensorrt, patch)
        build_engine(checkpoint, folder / "emitted", target=options, capacity=CAPACITY)
        compiled_directory.compile_engine(folder / "emitted", folder / "tensorrt")
    build_engine(checkpoint, folder / "cpu", capacity=CAPACITY, top_k=4, prefill_step=MAX_STEP)
    graphs = {hash_file(path): path for name, _ in ENGINES for path in [folder / "tensorrt" / name / GRAPH]}
    return Engines(folder / "emitted", folder / "tensorrt", folder / "cpu", graphs)


@pytest.fixture(scope="session")
def fp32(fp16: Engines, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return _in_fp32(fp16, tmp_path_factory.mktemp("tensorrt_fp32"), "standard")


@pytest.fixture(scope="session")
def fp32_plugins(fp16: Engines, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return _in_fp32(fp16, tmp_path_factory.mktemp("tensorrt_fp32_plugins"), "plugins")


def _in_fp32(fp16: Engines, folder: Path, operators: Operators) -> Engines:
    """The same plans over an fp32 pool; the double runs the fp32 form of their graphs, so that results can be compared
    closely.
    """
    checkpoint = Checkpoint(fp16.emitted.parent / "int4")
    compiled = Path(shutil.copytree(fp16.tensorrt, folder / "tensorrt"))
    manifest = Manifest.read(compiled)
    (folder / "graphs").mkdir()
    limits = manifest.limits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int4_product, "_LEAST_SPLIT", LEAST_SPLIT)
        network = write_pool_and_kernels(checkpoint, folder / "graphs", "tensorrt", "fp32", (), limits, no_progress)
        write_graphs(network, folder / "graphs", operators, no_progress)
    shutil.copyfile(folder / "graphs" / POOL, compiled / POOL)
    precision = manifest.precision.model_copy(update={"activations": "fp32", "kv_cache": "fp32"})
    manifest.model_copy(update={"precision": precision, "pool": network.pool.entries()}).write(compiled)
    graphs = {hash_file(compiled / name / GRAPH): folder / "graphs" / name / GRAPH for name, _ in ENGINES}
    return Engines(fp16.emitted, compiled, fp16.cpu, graphs)


class Machine(NamedTuple):
    """A machine whose one GPU is a double."""

    cuda: DriverDouble
    trt: TrtRuntimeDouble


@pytest.fixture
def machine(tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch, fp16: Engines) -> Machine:
    driver = DriverDouble()
    trt = TrtRuntimeDouble(tensorrt, driver, fp16.graphs)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: LibcudaDouble())
    monkeypatch.setattr(device, "driver", driver)
    for module in ("plan_loading", "tensorrt_network"):
        monkeypatch.setattr(importlib.import_module(f"trimode.runtime.tensorrt.{module}"), "trt", trt)
    return Machine(driver, trt)


@pytest.fixture
def exact(machine: Machine, fp32: Engines) -> Engines:
    machine.trt.graphs = fp32.graphs
    return fp32


@pytest.fixture
def exact_plugins(machine: Machine, fp32_plugins: Engines) -> Engines:
    machine.trt.graphs = fp32_plugins.graphs
    return fp32_plugins
