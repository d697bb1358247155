"""The rows of a step that need logits."""

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
)


class SelectRows(Operator):
    """The rows ``logit_rows`` of each sequence. Every index is below S; the kernel does not check it."""

    name = "SelectRows"
    kernel = "select_rows.select_rows_kernel"
    inputs = (Operand("x", "real", ("B", "S", "W")), Operand("logit_rows", "int64", ("B", "L")))
    scalars = ("step", "selected_rows")
    outputs = (Operand("selected", "real", ("B", "L", "W")),)

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({"BLOCK": 1024}, warps=4, stages=1),)

    @staticmethod
    def node(*, batch: int, step: int, rows: int, width: int) -> Node:
        return Node.of({"x": (batch, step, width), "logit_rows": (batch, rows)})

    def constants(self, node: Node) -> Constants:
        return {"WIDTH": node.fixed["x"][2]}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each selected row and BLOCK columns."""
        batch, rows = node.shapes["logit_rows"]
        return batch * rows, ceil_div(self.constants(node)["WIDTH"], tactic.constants["BLOCK"]), 1

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        return node.shapes["x"][1], node.shapes["logit_rows"][1]

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        return [(*node.shapes["logit_rows"], node.shapes["x"][2])]
