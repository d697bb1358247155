"""The targets that ``trimode build`` can build for. A new target registers here."""

from __future__ import annotations

from trimode.build.cpu.target import CpuTarget
from trimode.build.cuda.target import CudaTarget
from trimode.build.rtx.target import RtxTarget
from trimode.build.target import BuildTarget
from trimode.build.tensorrt.target import TensorrtTarget

TARGETS: dict[str, type[BuildTarget]] = {
    "cpu": CpuTarget,
    "cuda": CudaTarget,
    "rtx": RtxTarget,
    "tensorrt": TensorrtTarget,
}
