"""Target ``cpu``: graphs that ONNX Runtime optimised, over a pool with weights packed for its kernels."""

from __future__ import annotations

from typing import Literal

from trimode.engine.targets.section import TargetSection

MODEL = "model.onnx"
Activations = Literal["fp32", "int8"]


class CpuSection(TargetSection):
    """Packed weights depend on ``instruction_set`` and on the version of ``onnxruntime``; another machine needs its own
    build.

    activations: ``int8`` if the inputs of int4 products are rounded to 8 bits.
    unpacked: whether the pool holds the int4 matrices as fp32, multiplied by their scales.
    """

    name: Literal["cpu"] = "cpu"
    instruction_set: str
    onnxruntime: str
    activations: Activations
    unpacked: bool

    @property
    def engine_files(self) -> tuple[str, ...]:
        return (MODEL,)

    @property
    def summary(self) -> str:
        unpacked = ", int4 weights unpacked to fp32" if self.unpacked else ""
        return f"onnxruntime {self.onnxruntime} on {self.instruction_set}; {self.activations} activations{unpacked}"
