"""Target ``cpu``: graphs that ONNX Runtime optimised, over a pool with weights packed for its kernels."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from trimode.engine.targets.section import TargetSection

Activations = Literal["fp32", "int8"]


class CpuSection(TargetSection):
    """Packed weights depend on ``instruction_set`` and on the version of ``onnxruntime``. A machine that differs needs
    another build.

    activations: the inputs of int4 products; ``int8`` if they are rounded to 8 bits (w4a8), ``fp32`` if they are exact
    or no product has int4 weights.
    unpacked: whether the pool holds the int4 matrices as fp32, multiplied by their scales.
    pieces: graphs that an engine consists of: one, or as many as there are between the sums of ranks.
    """

    name: Literal["cpu"] = "cpu"
    instruction_set: str
    onnxruntime: str
    activations: Activations
    unpacked: bool
    pieces: PositiveInt

    @property
    def engine_files(self) -> tuple[str, ...]:
        return model_files(self.pieces)

    @property
    def summary(self) -> str:
        products = "int8 activations in int4 products (w4a8)" if self.activations == "int8" else "exact products"
        unpacked = ", int4 weights unpacked to fp32" if self.unpacked else ""
        return f"onnxruntime {self.onnxruntime} on {self.instruction_set}; {products}{unpacked}"


def model_files(pieces: int) -> tuple[str, ...]:
    """The graphs of an engine, in the order of a pass."""
    return ("model.onnx",) if pieces == 1 else tuple(f"model.{index}.onnx" for index in range(pieces))


SECTION = CpuSection
