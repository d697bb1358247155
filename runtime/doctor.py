"""What a machine can build and run, in plain words."""

from __future__ import annotations

import ctypes
import platform
from importlib.metadata import PackageNotFoundError, version

from pydantic import BaseModel

from trimode.model.machine import instruction_set

_PACKAGES = ("onnxruntime", "onnx", "torch", "nvidia-modelopt", "tensorrt-rtx-cu13")
_CUDA_SUCCESS = 0
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class Gpu(BaseModel):
    """compute_capability: 121 is 12.1, as ``trimode build --sm`` takes it."""

    name: str
    compute_capability: int


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
    driver, gpus = _gpus()
    packages = {name: _version(name) for name in _PACKAGES}
    return Findings(
        machine=instruction_set(),
        python=platform.python_version(),
        driver=driver,
        gpus=gpus,
        packages=packages,
        targets=_targets(packages),
    )


def _targets(packages: dict[str, str | None]) -> dict[str, str]:
    builds = packages["onnx"] is not None
    to_build = "builds" if builds else "does not build: pip install 'trimode[build]'"
    if not builds:
        rtx = to_build
    elif packages["tensorrt-rtx-cu13"] is None:
        rtx = "does not build: pip install 'trimode[rtx]'"
    else:
        rtx = "builds and audits, with or without a GPU"
    return {"cpu": f"runs; {to_build}", "rtx": f"{rtx}; does not run: this version has no executor for it"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[str, list[Gpu]]:
    """What the driver says, and its GPUs. The driver's own library: nothing of CUDA need be installed to ask it."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "none (libcuda.so.1 is not installed)", []
    if status := cuda.cuInit(0):
        return f"installed, but it does not start (CUDA error {status})", []
    number, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = []
    for index in range(count.value):
        device, name, part = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
        if cuda.cuDeviceGet(ctypes.byref(device), index) != _CUDA_SUCCESS:
            continue
        cuda.cuDeviceGetName(name, len(name), device)
        capability = 0
        for attribute in _COMPUTE_CAPABILITY:
            cuda.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
            capability = capability * 10 + part.value
        gpus.append(Gpu(name=name.value.decode(errors="replace"), compute_capability=capability))
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}", gpus
