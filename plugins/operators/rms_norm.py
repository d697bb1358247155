"""Root mean square normalisation."""

from __future__ import annotations

from typing import ClassVar

from trimode.plugins.operators.operator import Constants, Dim, Node, Operand, Operator, Tactic, numbered, row_count


class RmsNorm(Operator):
    """x / sqrt(mean(x^2) + epsilon) in fp32, rounded to the type of ``x``, times ``weight``: ONNX RMSNormalization.

    The rows may be spread over several dimensions.
    """

    name = "RmsNorm"
    kernel = "rms_norm.rms_norm_kernel"
    inputs = (
        Operand("x", "real", ("M", "H")),
        Operand("weight", "real", ("H",)),
        Operand("epsilon", "fp32", ("1",)),
    )
    scalars = ()
    outputs = (Operand("normed", "real", ("M", "H")),)

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({}, warps=4, stages=1), Tactic({}, warps=8, stages=1))

    @staticmethod
    def node(*, rows: int, width: int) -> Node:
        return Node.of({"x": (rows, width), "weight": (width,), "epsilon": (1,)})

    def constants(self, node: Node) -> Constants:
        return {"WIDTH": node.fixed["weight"][0]}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, _tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each row."""
        return row_count(node.shapes["x"]), 1, 1

    def scalar_values(self, _node: Node) -> tuple[Dim, ...]:
        return ()

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        return [tuple(node.shapes["x"])]
