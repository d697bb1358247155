"""One checkpoint built for targets rtx and cpu, and a machine whose GPU is a double."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import tensorrt_rtx

from tests.support.driver_double import DriverDouble, LibcudaDouble
from tests.support.rtx_double import PlanDouble, TrtDouble, plan_doubles
from trimode.build.engine_builder import build_engine
from trimode.build.graph.network import NetworkOptions, build_network
from trimode.build.graph.raw_pool import write_raw_pool
from trimode.build.rtx.target import RtxTarget
from trimode.common.progress import no_progress
from trimode.engine.manifest import Manifest
from trimode.engine.targets.rtx import GRAPH
from trimode.model.checkpoint import Checkpoint
from trimode.model.step import ENGINES
from trimode.quantize import quantize_checkpoint
from trimode.runtime.gpu import device
from trimode.runtime.rtx import execution_contexts, plan_loading

CAPACITY, MAX_BATCH, MAX_STEP = 512, 4, 64


class Engines(NamedTuple):
    """One checkpoint built for targets rtx and cpu, and what the double needs to run the plans."""

    rtx: Path
    cpu: Path
    plans: list[PlanDouble]


@pytest.fixture(scope="session")
def rtn_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rtn") / "checkpoint"
    quantize_checkpoint(Checkpoint(tiny_checkpoint), out, method="rtn", group=64)
    return out


@pytest.fixture(scope="session")
def fp16(rtn_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Built as for users. The double runs the graphs of the engine directory."""
    folder, checkpoint = tmp_path_factory.mktemp("fp16"), Checkpoint(rtn_checkpoint)
    options = RtxTarget(sms=(121, 89), dtype="fp16", max_batch=MAX_BATCH, max_step=MAX_STEP)
    build_engine(checkpoint, folder / "rtx", target=options, capacity=CAPACITY)
    build_engine(checkpoint, folder / "cpu", capacity=CAPACITY, top_k=4, prefill_step=MAX_STEP)
    write_raw_pool(checkpoint, folder / "raw.bin", no_progress, np.dtype(np.float16))
    for name, _ in ENGINES:
        shutil.copyfile(folder / "rtx" / name / GRAPH, folder / f"{name}.onnx")
    return Engines(folder / "rtx", folder / "cpu", plan_doubles(folder / "rtx", folder))


@pytest.fixture(scope="session", params=["view", "window"])
def fp32(
    request: pytest.FixtureRequest, rtn_checkpoint: Path, fp16: Engines, tmp_path_factory: pytest.TempPathFactory
) -> Engines:
    """The same plans, but the double runs the fp32 form of their graphs, so that results can be compared closely.
    TensorRT-RTX has no attention in fp32. Both ways to read the KV pool: in place, and by a window.
    """
    folder, checkpoint = tmp_path_factory.mktemp("fp32"), Checkpoint(rtn_checkpoint)
    rtx = Path(shutil.copytree(fp16.rtx, folder / "rtx"))
    manifest = Manifest.read(rtx)
    manifest.model_copy(
        update={"precision": manifest.precision.model_copy(update={"activations": "fp32", "kv_cache": "fp32"})}
    ).write(rtx)
    pool = write_raw_pool(checkpoint, folder / "raw.bin", no_progress, np.dtype(np.float32))
    options = NetworkOptions(
        top_k=4,
        adapter=True,
        capacity=CAPACITY,
        kv_read=request.param,
        rotate_together=True,
        select_by_product=True,
        masks="apart",
    )
    for name, pattern in ENGINES:
        onnx.save(build_network(checkpoint.config, pool, pattern, options), folder / f"{name}.onnx")
    return Engines(rtx, fp16.cpu, plan_doubles(rtx, folder))


class Machine(NamedTuple):
    """A machine whose one GPU is a double."""

    cuda: DriverDouble
    trt: TrtDouble


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, fp16: Engines) -> Machine:
    driver = DriverDouble()
    trt = TrtDouble(tensorrt_rtx, driver, fp16.plans)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: LibcudaDouble())
    monkeypatch.setattr(device, "driver", driver)
    monkeypatch.setattr(plan_loading, "trt", trt)
    monkeypatch.setattr(execution_contexts, "trt", trt)
    return Machine(driver, trt)


@pytest.fixture
def exact(machine: Machine, fp32: Engines) -> Engines:
    machine.trt.plans = fp32.plans
    return fp32
