"""Target ``cuda`` on the side of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimode.common.errors import TriModeError
from trimode.common.installation import Installation
from trimode.engine.kernel_library import COMPUTE_CAPABILITIES
from trimode.engine.manifest import Manifest
from trimode.engine.targets.cuda import CudaSection
from trimode.runtime.gpu.gpu_choice import choose_gpus
from trimode.runtime.ranks.ranked_executor import RankedExecutor
from trimode.runtime.target import HostLimits, RuntimeTarget

if TYPE_CHECKING:
    from trimode.runtime.cuda.cuda_executor import CudaExecutor


RANK_PROCESS = "trimode.runtime.cuda.rank_process"


class CudaRuntime:
    packages: tuple[str, ...] = ("cuda-bindings",)

    def load_executor(self, engine: Path, manifest: Manifest, limits: HostLimits) -> CudaExecutor | RankedExecutor:
        gpus = choose_gpus(engine, "cuda", manifest.section(CudaSection).sms, manifest.ranks, portable=True)
        try:
            from trimode.runtime.cuda.cuda_executor import load_cuda_executor
        except ImportError as error:
            raise TriModeError(
                f"{engine} is for target cuda, which needs the package {error.name}: pip install 'trimode[cuda]'"
            ) from None
        if manifest.ranks > 1:
            return RankedExecutor(RANK_PROCESS, engine, manifest, limits, on_gpus=True)
        return load_cuda_executor(engine, manifest, gpus[0])

    def can_run(self, installation: Installation) -> str:
        gpus = installation.gpus.found
        if not gpus:
            return "does not run: it needs an NVIDIA GPU and its driver"
        supported = [gpu for gpu in gpus if gpu.compute_capability >= min(COMPUTE_CAPABILITIES)]
        if not supported:
            return "does not run: it needs a GPU of compute capability 8.0 or later"
        if not installation.has("cuda-bindings"):
            return "does not run: pip install 'trimode[cuda]'"
        return f"runs on {supported[0].name}, if built with --sm {supported[0].compute_capability} or --sm 80"


TARGET: RuntimeTarget = CudaRuntime()
