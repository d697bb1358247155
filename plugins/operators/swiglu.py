"""The gated activation of the MLP."""

from __future__ import annotations

from typing import ClassVar

from trimode.plugins.operators.operator import (
    Constants,
    Dim,
    Node,
    Operand,
    Operator,
    Tactic,
    ceil_div,
    numbered,
    row_count,
)


class SwiGlu(Operator):
    """gate * sigmoid(gate) * up in fp32. ``gate_up`` holds the columns of gate, then those of up.

    The rows may be spread over several dimensions.
    """

    name = "SwiGlu"
    kernel = "swiglu.swiglu_kernel"
    inputs = (Operand("gate_up", "real", ("M", "2 I")),)
    scalars = ()
    outputs = (Operand("activated", "real", ("M", "I")),)

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({"BLOCK": 1024}, warps=4, stages=1),)

    @staticmethod
    def node(*, rows: int, width: int) -> Node:
        """width: I, the columns of the output."""
        return Node.of({"gate_up": (rows, 2 * width)})

    def constants(self, node: Node) -> Constants:
        return {"WIDTH": node.fixed["gate_up"][-1] // 2}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each row and BLOCK columns."""
        width = self.constants(node)["WIDTH"]
        return row_count(node.shapes["gate_up"]), ceil_div(width, tactic.constants["BLOCK"]), 1

    def scalar_values(self, _node: Node) -> tuple[Dim, ...]:
        return ()

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        *rows, width = node.shapes["gate_up"]
        return [(*rows, width // 2)]
