"""Products with weights that are not quantised."""

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


class DenseProduct(Operator):
    """y = (x W) * row_scale + narrow up + residual, with the terms that the operator was made with.

    ``weight`` is W, [K, N], as in the weight pool. ``row_scale`` has one factor for each sequence; ``x`` is then
    [B, S, K]. ``narrow`` is x times the adapter's down matrix and its scale. Without ``row_scale``, the rows of ``x``,
    ``narrow``, ``residual`` and ``y`` may be spread over several dimensions.
    """

    kernel = "dense_product.dense_product_kernel"

    # The tile of 16 columns is for products with few of them (the adapter's down), which are few programs.
    TACTICS: ClassVar[tuple[Tactic, ...]] = (
        Tactic({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128}, warps=2, stages=4),
        Tactic({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}, warps=4, stages=4),
        Tactic({"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64}, warps=4, stages=3),
        Tactic({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, warps=4, stages=3),
        Tactic({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, warps=8, stages=3),
    )

    def __init__(self, *, row_scale: bool = False, adapter: bool = False, residual: bool = False) -> None:
        terms = (("RowScaled", row_scale), ("Adapted", adapter), ("Residual", residual))
        self.name = "DenseProduct" + "".join(term for term, present in terms if present)
        self.row_scale = row_scale
        rows = ("B", "S") if row_scale else ("M",)
        self.inputs = (
            Operand("x", "real", (*rows, "K")),
            Operand("weight", "real", ("K", "N")),
            *((Operand("row_scale", "real", ("B",)),) if row_scale else ()),
            *((Operand("narrow", "real", (*rows, "R")), Operand("adapter_up", "real", ("R", "N"))) if adapter else ()),
            *((Operand("residual", "real", (*rows, "N")),) if residual else ()),
        )
        self.scalars = ("rows", "step") if row_scale else ("rows",)
        self.outputs = (Operand("y", "real", (*rows, "N")),)

    def node(self, *, batch: int = 1, step: int, inner: int, columns: int, rank: int = 0) -> Node:
        """rank: of the adapter, 0 without one. Without a row scale there are batch * step rows in one dimension."""
        rows = (batch, step) if self.row_scale else (batch * step,)
        shapes = {
            "x": (*rows, inner),
            "weight": (inner, columns),
            "row_scale": (batch,),
            "narrow": (*rows, rank),
            "adapter_up": (rank, columns),
            "residual": (*rows, columns),
        }
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs})

    def constants(self, node: Node) -> Constants:
        inner, columns = node.fixed["weight"]
        rank = node.fixed["adapter_up"][0] if "adapter_up" in node.fixed else 0
        return {"INNER": inner, "COLUMNS": columns, "RANK": rank}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each tile of rows and columns; the tiles of rows that share weights are neighbours."""
        rows, columns = row_count(node.shapes["x"]), self.constants(node)["COLUMNS"]
        return ceil_div(rows, tactic.constants["BLOCK_M"]), ceil_div(columns, tactic.constants["BLOCK_N"]), 1

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        rows = row_count(node.shapes["x"])
        return (rows, node.shapes["x"][1]) if self.row_scale else (rows,)

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        return [(*list(node.shapes["x"])[:-1], node.shapes["weight"][1])]
