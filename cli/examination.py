"""What a machine can build and run, in plain words."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from pydantic import BaseModel

from trimode.common.gpus import Gpu, Gpus, find_gpus
from trimode.common.machine import instruction_set
from trimode.engine.targets.rtx import COMPUTE_CAPABILITIES

_PACKAGES = (
    *("onnxruntime", "onnx", "torch", "nvidia-modelopt", "tensorrt-rtx-cu13", "cuda-bindings"),
    *("triton", "tensorrt"),
)


class Findings(BaseModel):
    """``packages``: version, or None if it is not installed. ``targets``: a sentence each."""

    machine: str
    python: str
    driver: str
    gpus: list[Gpu]
    packages: dict[str, str | None]
    targets: dict[str, str]

    def lines(self) -> list[tuple[str, str]]:
        gpus = [f"{gpu.name}, compute capability {gpu.compute_capability}" for gpu in self.gpus]
        rows = [("machine", self.machine), ("python", self.python), ("CUDA driver", self.driver)]
        rows += [("GPU", gpu) for gpu in gpus or ["none"]]
        rows += [(name, found or "not installed") for name, found in self.packages.items()]
        rows += [(f"target {name}", sentence) for name, sentence in self.targets.items()]
        return rows


def examine() -> Findings:
    """Look at this machine; starts nothing and loads no model."""
    gpus = find_gpus()
    packages = {name: _version(name) for name in _PACKAGES}
    return Findings(
        machine=instruction_set(),
        python=platform.python_version(),
        driver=gpus.driver,
        gpus=gpus.found,
        packages=packages,
        targets=_targets(packages, gpus),
    )


def _targets(packages: dict[str, str | None], gpus: Gpus) -> dict[str, str]:
    builds = packages["onnx"] is not None
    to_build = "builds" if builds else "does not build: pip install 'trimode[build]'"
    if not builds:
        rtx = to_build
    elif packages["tensorrt-rtx-cu13"] is None:
        rtx = "does not build: pip install 'trimode[rtx]'"
    else:
        rtx = "builds and audits, with or without a GPU"
    return {
        "cpu": f"runs; {to_build}",
        "rtx": f"{_rtx_runs(packages, gpus)}; {rtx}",
        "tensorrt": f"does not run: this version has no executor for it; {_tensorrt_builds(packages, gpus)}",
    }


def _tensorrt_builds(packages: dict[str, str | None], gpus: Gpus) -> str:
    if packages["onnx"] is None or packages["triton"] is None:
        return "does not build: pip install 'trimode[build,tensorrt]'"
    if packages["tensorrt"] is None:
        return "builds with --emit-only; to compile: pip install 'tensorrt>=11.4,<12' on a machine with a GPU"
    return "builds" if gpus.found else "builds with --emit-only; to compile it needs an NVIDIA GPU and its driver"


def _rtx_runs(packages: dict[str, str | None], gpus: Gpus) -> str:
    if not gpus.found:
        return "does not run: it needs an NVIDIA GPU and its driver"
    fitting = [gpu for gpu in gpus.found if gpu.compute_capability in COMPUTE_CAPABILITIES]
    if not fitting:
        needed = ", ".join(map(str, COMPUTE_CAPABILITIES))
        return f"does not run: it needs a GPU of compute capability {needed}"
    if packages["tensorrt-rtx-cu13"] is None or packages["cuda-bindings"] is None:
        return "does not run: pip install 'trimode[rtx]'"
    return f"runs on {fitting[0].name}, if built with --sm {fitting[0].compute_capability}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
