"""The executor of an engine directory, by its target."""

from __future__ import annotations

from pathlib import Path

from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.runtime.cpu.executor import CpuExecutor
from trimode.runtime.executor import Executor
from trimode.runtime.rtx import load_rtx_executor


def load_executor(engine: Path, manifest: Manifest, threads: int | None, kv_cache_bytes: int | None) -> Executor:
    """Raises TriModeError if the engine cannot run on this machine.

    threads, kv_cache_bytes: of target cpu; on a GPU, the build has set the size of the KV pool.
    """
    if manifest.target.name == "rtx":
        return load_rtx_executor(engine, manifest)
    if manifest.target.name == "tensorrt":
        raise TriModeError(
            f"{engine} is for target tensorrt, which this version builds and does not run; for this machine: "
            "trimode build CHECKPOINT OUT --target cpu, or rtx"
        )
    return CpuExecutor(engine, manifest, threads, kv_cache_bytes)
