"""Target ``tensorrt`` on the side of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimode.common.errors import TriModeError
from trimode.common.installation import Installation
from trimode.engine.kernel_library import COMPUTE_CAPABILITIES
from trimode.engine.manifest import Manifest
from trimode.engine.targets.tensorrt import TensorrtSection, has_tensorrt
from trimode.runtime.gpu.gpu_choice import choose_gpu
from trimode.runtime.target import HostLimits, RuntimeTarget

if TYPE_CHECKING:
    from trimode.runtime.tensorrt.tensorrt_executor import TensorrtExecutor


class TensorrtRuntime:
    packages: tuple[str, ...] = ("tensorrt-cu13", "tensorrt", "cuda-bindings")

    def load_executor(self, engine: Path, manifest: Manifest, _limits: HostLimits) -> TensorrtExecutor:
        plans = manifest.section(TensorrtSection).plans
        if plans is None:
            raise TriModeError(
                f"{engine} has no plans yet; on the machine with the GPU, run: trimode compile {engine} OUT"
            )
        ordinal = choose_gpu(engine, "tensorrt", (plans.compute_capability,))
        try:
            from trimode.runtime.tensorrt.tensorrt_executor import TensorrtExecutor
        except (ImportError, OSError) as error:
            # Without TensorRT's libraries, its bindings raise an error that names no package.
            missing = getattr(error, "name", None) or str(error).splitlines()[0]
            raise TriModeError(
                f"{engine} is for target tensorrt, which needs the package {missing}: pip install 'trimode[tensorrt]'"
            ) from None
        return TensorrtExecutor(engine, manifest, plans, ordinal)

    def can_run(self, installation: Installation) -> str:
        gpus = installation.gpus.found
        if not gpus:
            return "does not run: it needs an NVIDIA GPU and its driver"
        supported = [gpu for gpu in gpus if gpu.compute_capability in COMPUTE_CAPABILITIES]
        if not supported:
            needed = ", ".join(map(str, COMPUTE_CAPABILITIES))
            return f"does not run: it needs a GPU of compute capability {needed}"
        if not (has_tensorrt(installation) and installation.has("cuda-bindings")):
            return "does not run: pip install 'trimode[tensorrt]'"
        return f"runs on {supported[0].name}, if compiled there (no plan was ever run)"


TARGET: RuntimeTarget = TensorrtRuntime()
