"""The targets' sections of the manifest. A new target registers its section here."""

from __future__ import annotations

from trimode.engine.targets.cpu import CpuSection
from trimode.engine.targets.cuda import CudaSection
from trimode.engine.targets.rtx import RtxSection
from trimode.engine.targets.section import TargetSection
from trimode.engine.targets.tensorrt import TensorrtSection

SECTIONS: dict[str, type[TargetSection]] = {
    "cpu": CpuSection,
    "cuda": CudaSection,
    "rtx": RtxSection,
    "tensorrt": TensorrtSection,
}
