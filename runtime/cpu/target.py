"""Target ``cpu`` on the side of the runtime. Its packages are part of the base installation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimode.common.installation import Installation
from trimode.engine.manifest import Manifest
from trimode.runtime.target import HostLimits, RuntimeTarget

if TYPE_CHECKING:
    from trimode.runtime.cpu.cpu_executor import CpuExecutor
    from trimode.runtime.ranks.ranked_executor import RankedExecutor


class CpuRuntime:
    packages: tuple[str, ...] = ("onnxruntime",)

    def load_executor(self, engine: Path, manifest: Manifest, limits: HostLimits) -> CpuExecutor | RankedExecutor:
        if manifest.ranks > 1:
            from trimode.runtime.cpu.sessions import refuse_foreign_layout
            from trimode.runtime.ranks.ranked_executor import RankedExecutor

            refuse_foreign_layout(engine, manifest)
            return RankedExecutor("trimode.runtime.cpu.rank_process", engine, manifest, limits)
        from trimode.runtime.cpu.cpu_executor import CpuExecutor

        return CpuExecutor(engine, manifest, limits.threads, limits.kv_cache_bytes)

    def can_run(self, _installation: Installation) -> str:
        return "runs"


TARGET: RuntimeTarget = CpuRuntime()
