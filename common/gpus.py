"""The GPUs of this machine, listed by the CUDA driver. No CUDA package is needed."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from pydantic import BaseModel

_SUCCESS = 0
_NO_DEVICE = 100
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class Gpu(BaseModel):
    """compute_capability: 121 for 12.1, as ``trimode build --sm`` takes it. ordinal: the driver's index of the GPU."""

    ordinal: int
    name: str
    compute_capability: int


class Gpus(NamedTuple):
    """driver: its version, or why it cannot be used, in words. found: the GPUs; empty if there are none."""

    driver: str
    found: list[Gpu]


def find_gpus() -> Gpus:
    """Ask the driver. Never raises: a missing driver is part of the answer."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Gpus("none (libcuda.so.1 is not installed)", [])
    status = cuda.cuInit(0)
    if status == _NO_DEVICE:
        return Gpus("installed, but it finds no GPU", [])
    if status != _SUCCESS:
        return Gpus(f"installed, but it does not start (CUDA error {status})", [])
    number, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = []
    for ordinal in range(count.value):
        device, name, part = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
        if cuda.cuDeviceGet(ctypes.byref(device), ordinal) != _SUCCESS:
            continue
        cuda.cuDeviceGetName(name, len(name), device)
        capability = 0
        for attribute in _COMPUTE_CAPABILITY:
            cuda.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
            capability = capability * 10 + part.value
        gpus.append(Gpu(ordinal=ordinal, name=name.value.decode(errors="replace"), compute_capability=capability))
    return Gpus(f"CUDA {number.value // 1000}.{number.value % 1000 // 10}", gpus)
