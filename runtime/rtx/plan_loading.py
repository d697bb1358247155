"""Loading of both plans of an engine directory over one copy of their weights.

A deserialised plan has its own copy of the weights on the GPU. ``IWeightsManager`` reads that copy and unloads it, and
then maps ranges of memory that TriMode allocated. Ranges that are equal in both engines are allocated once and mapped
into both; other ranges are allocated for each engine. An engine whose weights TensorRT-RTX does not manage keeps its
own copy, and a warning is logged.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorrt_rtx as trt

from trimode.common.errors import TriModeError
from trimode.engine.files import POOL
from trimode.engine.plan_file import PlanEntry, whole_plan
from trimode.engine.targets.rtx import PLAN, RtxSection
from trimode.runtime.gpu.device import Bytes, Device
from trimode.runtime.gpu.plan_log import LastErrorLog
from trimode.runtime.gpu.plan_version import release

logger = logging.getLogger(__name__)


class WeightPlacement(NamedTuple):
    """shared, private: bytes on the device for both engines, and for one engine only. unmanaged_engines: the number of
    engines whose weights TensorRT-RTX does not manage; each keeps its own copy, which these counts leave out.
    """

    shared: int
    private: int
    unmanaged_engines: int


@dataclass(frozen=True)
class Plans:
    """The AR and the diffusion engine (``ICudaEngine``), ready to run."""

    ar: Any
    diffusion: Any
    weights: WeightPlacement


class _RtxLog(LastErrorLog, trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        LastErrorLog.__init__(self, "TensorRT-RTX")

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        self.keep(message, severity <= trt.ILogger.Severity.ERROR)


# TensorRT-RTX uses the first logger of a process for all runtimes.
LOG = _RtxLog()


class _Managed(NamedTuple):
    """An engine whose weights were unloaded from the device; ``section`` holds all of them on the host."""

    manager: Any
    section: Bytes


def load_plans(device: Device, engine: Path, entry: RtxSection) -> Plans:
    """Load the plans. Raises TriModeError that names a plan that is incomplete, or not for this runtime and GPU.

    Peak host memory: the weights of both engines. Peak device memory: the final amount and one engine's own copy.
    """
    if release(entry.tensorrt_rtx) != release(trt.__version__):
        raise TriModeError(
            f"{engine} was built with TensorRT-RTX {entry.tensorrt_rtx}, this is {trt.__version__}; "
            f"pip install tensorrt-rtx-cu13=={entry.tensorrt_rtx}, or build it again"
        )
    runtime = trt.Runtime(LOG)
    engines, managed = [], []
    for name, plan in (("ar", entry.ar), ("diffusion", entry.diffusion)):
        loaded = _deserialise(runtime, engine, name, plan)
        engines.append(loaded)
        manager = loaded.create_weights_manager()
        if manager is not None:
            managed.append(_unload(device, manager))
    shared, private = _place(device, managed)
    placement = WeightPlacement(shared, private, len(engines) - len(managed))
    if placement.unmanaged_engines:
        logger.warning(
            "%s: TensorRT-RTX does not manage the weights of %d of its plans: each has a copy of its own on the GPU",
            engine,
            placement.unmanaged_engines,
        )
    elif private:
        logger.warning("%s: %.1f MB of weights are shared, %.1f MB are not", engine, shared / 1e6, private / 1e6)
    ar, diffusion = engines
    return Plans(ar, diffusion, placement)


def _deserialise(runtime: Any, engine: Path, name: str, entry: PlanEntry) -> Any:
    path = engine / name / PLAN
    content = np.empty(entry.private_bytes + sum(splice.bytes for splice in entry.splices), np.uint8)
    at = 0
    for chunk in whole_plan(path, engine / POOL, entry):
        content[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at += len(chunk)
    validity, diagnostics = runtime.get_engine_validity(content[: runtime.engine_header_size])
    remedy = "build the engine again: trimode build CHECKPOINT OUT --target rtx"
    if validity == trt.EngineValidity.INVALID:
        found = [
            name.replace("_", " ").lower()
            for name, bit in trt.EngineInvalidityDiagnostics.__members__.items()
            if diagnostics & int(bit)
        ]
        raise TriModeError(f"{path}: TensorRT-RTX refuses it ({', '.join(found) or LOG.complaint}); {remedy}")
    loaded = runtime.deserialize_cuda_engine(content)
    if loaded is None:
        raise TriModeError(f"{path}: TensorRT-RTX cannot load it ({LOG.complaint}); {remedy}")
    return loaded


def _unload(device: Device, manager: Any) -> _Managed:
    section = np.empty(manager.get_size(), np.uint8)
    saved = manager.save_to_buffer(section.ctypes.data, section.nbytes, trt.TensorLocation.HOST, device.stream)
    LOG.expect(saved, "saving the weights")
    device.synchronize()
    LOG.expect(manager.unload(device.stream), "unloading the weights")
    return _Managed(manager, section)


class _Piece(NamedTuple):
    """Bytes ``offset`` to ``offset + size`` of a section."""

    offset: int
    size: int


def _place(device: Device, managed: list[_Managed]) -> tuple[int, int]:
    """Give every engine its weights back. Returns the bytes that all engines share, and those of one engine only."""
    if not managed:
        return 0, 0
    common, own = _pieces([weights.section for weights in managed], device.granularity())
    for piece in common:
        _map(device, managed, piece)
    for weights, pieces in zip(managed, own, strict=True):
        for piece in pieces:
            _map(device, [weights], piece)
    return sum(piece.size for piece in common), sum(piece.size for pieces in own for piece in pieces)


def _map(device: Device, engines: list[_Managed], piece: _Piece) -> None:
    """Allocate a piece once and map it into each of these engines, which TensorRT does from its first byte on."""
    content = engines[0].section[piece.offset : piece.offset + piece.size]
    memory = device.create_physical(content)
    for engine in engines:
        mapped = engine.manager.restore_from_vmm_allocation(int(memory), piece.offset, piece.size, device.stream)
        LOG.expect(mapped, "mapping the weights")
    device.synchronize()
    device.release_physical(memory)


def _pieces(sections: list[Bytes], granularity: int) -> tuple[list[_Piece], list[list[_Piece]]]:
    """Runs of whole granules that two sections have in common, and the remaining runs of each section."""
    equal = [
        len(sections) == 2 and np.array_equal(sections[0][at : at + granularity], sections[1][at : at + granularity])
        for at in range(0, max(map(len, sections)), granularity)
    ]
    common: list[_Piece] = []
    own: list[list[_Piece]] = [[] for _ in sections]
    at = 0
    for same, granules in groupby(equal):
        end = at + granularity * len(list(granules))
        if same:
            common.append(_Piece(at, end - at))
        else:
            for section, pieces in zip(sections, own, strict=True):
                if at < len(section):
                    pieces.append(_Piece(at, min(end, len(section)) - at))
        at = end
    return common, own
