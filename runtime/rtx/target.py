"""Target ``rtx`` on the side of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimode.common.errors import TriModeError
from trimode.common.installation import Installation
from trimode.engine.manifest import Manifest
from trimode.engine.targets.rtx import COMPUTE_CAPABILITIES, RtxSection
from trimode.runtime.gpu.gpu_choice import choose_gpu
from trimode.runtime.target import HostLimits, RuntimeTarget

if TYPE_CHECKING:
    from trimode.runtime.rtx.rtx_executor import RtxExecutor


class RtxRuntime:
    packages: tuple[str, ...] = ("tensorrt-rtx-cu13", "cuda-bindings")

    def load_executor(self, engine: Path, manifest: Manifest, _limits: HostLimits) -> RtxExecutor:
        if manifest.ranks > 1:
            raise TriModeError(
                f"{engine} is divided among {manifest.ranks} ranks; target rtx builds and audits such plans, but does "
                f"not run them; build for target cuda: trimode build CHECKPOINT OUT --target cuda --tp {manifest.ranks}"
            )
        ordinal = choose_gpu(engine, "rtx", manifest.section(RtxSection).sms)
        try:
            from trimode.runtime.rtx.rtx_executor import RtxExecutor
        except ImportError as error:
            raise TriModeError(
                f"{engine} is for target rtx, which needs the package {error.name}: pip install 'trimode[rtx]'"
            ) from None
        return RtxExecutor(engine, manifest, ordinal)

    def can_run(self, installation: Installation) -> str:
        gpus = installation.gpus.found
        if not gpus:
            return "does not run: it needs an NVIDIA GPU and its driver"
        supported = [gpu for gpu in gpus if gpu.compute_capability in COMPUTE_CAPABILITIES]
        if not supported:
            needed = ", ".join(map(str, COMPUTE_CAPABILITIES))
            return f"does not run: it needs a GPU of compute capability {needed}"
        if not installation.has("tensorrt-rtx-cu13", "cuda-bindings"):
            return "does not run: pip install 'trimode[rtx]'"
        return f"runs on {supported[0].name}, if built with --sm {supported[0].compute_capability}"


TARGET: RuntimeTarget = RtxRuntime()
