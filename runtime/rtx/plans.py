"""Both plans of an engine directory, deserialised, over one copy of their weights where TensorRT-RTX lets them.

A plan comes to the GPU with its own copy of the weights. ``IWeightsManager`` tells what that copy is made of and takes
it back; pieces of it can then be mapped from memory of ours. What is the same in both engines is one piece, mapped into
both; the rest is a piece of each. An engine whose weights TensorRT-RTX does not manage keeps its own copy, and the log
says so.
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
from trimode.runtime.gpu.cuda import Bytes, Device

logger = logging.getLogger(__name__)


class WeightPlacement(NamedTuple):
    """Bytes on the device, held once for both engines or for one alone; and the engines whose weights TensorRT-RTX
    does not manage, so that each has them all to itself.
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


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps the last complaint: TensorRT returns none, and says why here."""

    def __init__(self) -> None:
        super().__init__()
        self.complaint = ""

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.complaint = message.splitlines()[0] if message else ""
        logger.debug("TensorRT-RTX: %s", message)


# TensorRT keeps the first logger that a process gives it.
_LOG = _Log()


def expect(result: Any, what: str) -> Any:
    """The result of a TensorRT call; raises RuntimeError, with TensorRT's own words, if it is None or False."""
    if result is None or result is False:
        raise RuntimeError(f"TensorRT-RTX: {what}: {_LOG.complaint or 'no reason given'}")
    return result


class _Managed(NamedTuple):
    """An engine whose weights were taken off the device; ``section`` is all of them."""

    manager: Any
    section: Bytes


def load_plans(device: Device, engine: Path, entry: RtxSection) -> Plans:
    """Raises TriModeError that names the plan if it is not whole, or not for this runtime and GPU.

    Takes host memory for both engines' weights while it loads, and no more device memory than it ends with, but for
    one engine's own copy.
    """
    if _release(entry.tensorrt_rtx) != _release(trt.__version__):
        raise TriModeError(
            f"{engine} was built with TensorRT-RTX {entry.tensorrt_rtx}, this is {trt.__version__}; "
            f"pip install tensorrt-rtx-cu13=={entry.tensorrt_rtx}, or build it again"
        )
    runtime = trt.Runtime(_LOG)
    engines, managed = [], []
    for name, plan in (("ar", entry.ar), ("diffusion", entry.diffusion)):
        loaded = _deserialise(runtime, engine, name, plan)
        engines.append(loaded)
        manager = loaded.create_weights_manager()
        if manager is not None:
            managed.append(_take_off(device, manager))
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


def _release(version: str) -> list[str]:
    """1.7.1 of 1.7.1.116: what a plan's header is held against."""
    return version.split(".")[:3]


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
        raise TriModeError(f"{path}: TensorRT-RTX refuses it ({', '.join(found) or _LOG.complaint}); {remedy}")
    loaded = runtime.deserialize_cuda_engine(content)
    if loaded is None:
        raise TriModeError(f"{path}: TensorRT-RTX cannot load it ({_LOG.complaint}); {remedy}")
    return loaded


def _take_off(device: Device, manager: Any) -> _Managed:
    section = np.empty(manager.get_size(), np.uint8)
    saved = manager.save_to_buffer(section.ctypes.data, section.nbytes, trt.TensorLocation.HOST, device.stream)
    expect(saved, "saving the weights")
    device.synchronize()
    expect(manager.unload(device.stream), "unloading the weights")
    return _Managed(manager, section)


class _Piece(NamedTuple):
    """Bytes ``offset`` to ``offset + size`` of a section."""

    offset: int
    size: int


def _place(device: Device, managed: list[_Managed]) -> tuple[int, int]:
    """Give every engine its weights back; returns the bytes held once for all, and those held for one."""
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
    """One allocation, which TensorRT maps from its first byte on, for the same piece of each of these engines."""
    content = engines[0].section[piece.offset : piece.offset + piece.size]
    memory = device.create_physical(content)
    for engine in engines:
        mapped = engine.manager.restore_from_vmm_allocation(int(memory), piece.offset, piece.size, device.stream)
        expect(mapped, "mapping the weights")
    device.synchronize()
    device.release_physical(memory)


def _pieces(sections: list[Bytes], granularity: int) -> tuple[list[_Piece], list[list[_Piece]]]:
    """Runs of whole granules that are the same in two sections, and what each section has beside them."""
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
