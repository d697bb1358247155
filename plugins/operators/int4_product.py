"""Products with int4 weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from trimode.plugins.operators.operator import Constants, Dim, Node, Operand, Operator, Tactic, ceil_div, numbered

# The inner size of a tensor core's multiplication; a group of weights that share a scale is a multiple of it.
LEAST_GROUP = 16


class Int4Product(Operator):
    """y = (x * input_scale) W + narrow up + residual, with the terms that the operator was made with.

    ``packed`` holds the bytes of the pool's ONNX INT4 matrix [K, N]: the low nibble is the even column. N is even, K a
    multiple of the group, and that of :data:`LEAST_GROUP`. ``narrow`` is x times the adapter's down matrix and its
    scale. The rows of ``x``, ``narrow``, ``residual`` and ``y`` may be spread over several dimensions.
    """

    kernel = "int4_product.int4_product_kernel"
    scalars = ("rows",)
    outputs = (Operand("y", "real", ("M", "N")),)

    # Tiles of up to 4 rows multiply without tensor cores. In tiles of few rows, each warp has so many columns that no
    # two warps unpack the same weights.
    TACTICS: ClassVar[tuple[Tactic, ...]] = (
        Tactic({"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 32}, warps=4, stages=4),
        Tactic({"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=4),
        Tactic({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}, warps=2, stages=4),
        Tactic({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64}, warps=4, stages=4),
        Tactic({"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64}, warps=2, stages=4),
        Tactic({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, warps=4, stages=3),
        Tactic({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=3),
    )

    def __init__(self, *, input_scale: bool = False, adapter: bool = False, residual: bool = False) -> None:
        terms = (("Scaled", input_scale), ("Adapted", adapter), ("Residual", residual))
        self.name = "Int4Product" + "".join(term for term, present in terms if present)
        self.inputs = (
            Operand("x", "real", ("M", "K")),
            Operand("packed", "int8", ("K", "N / 2")),
            Operand("scale", "real", ("K / group", "N")),
            *((Operand("input_scale", "real", ("K",)),) if input_scale else ()),
            *((Operand("narrow", "real", ("M", "R")), Operand("adapter_up", "real", ("R", "N"))) if adapter else ()),
            *((Operand("residual", "real", ("M", "N")),) if residual else ()),
        )

    def node(self, *, rows: int, inner: int, columns: int, group: int = 128, rank: int = 0) -> Node:
        """rank: of the adapter, 0 without one."""
        shapes = {
            "x": (rows, inner),
            "packed": (inner, columns // 2),
            "scale": (inner // group, columns),
            "input_scale": (inner,),
            "narrow": (rows, rank),
            "adapter_up": (rank, columns),
            "residual": (rows, columns),
        }
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs})

    def constants(self, node: Node) -> Constants:
        (inner, _), (groups, columns) = node.fixed["packed"], node.fixed["scale"]
        rank = node.fixed["adapter_up"][0] if "adapter_up" in node.fixed else 0
        return {"INNER": inner, "COLUMNS": columns, "GROUP": inner // groups, "RANK": rank}

    def tactics(self, node: Node) -> dict[int, Tactic]:
        group = self.constants(node)["GROUP"]
        return numbered([within_group(tactic, group) for tactic in self.TACTICS])

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each tile of rows and columns; the tiles of rows that share weights are neighbours."""
        (rows,), columns = self.scalar_values(node), self.constants(node)["COLUMNS"]
        return ceil_div(rows, tactic.constants["BLOCK_M"]), ceil_div(columns, tactic.constants["BLOCK_N"]), 1

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        rows, *others = list(node.shapes["x"])[:-1]
        for dimension in others:
            rows = rows * dimension
        return (rows,)

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        return [(*list(node.shapes["x"])[:-1], node.shapes["scale"][1])]


def within_group(tactic: Tactic, group: int) -> Tactic:
    """The tactic for groups of this size: a tile along the inner dimension may not cross a group's border."""
    block = math.gcd(tactic.constants["BLOCK_K"], group)
    return replace(tactic, constants={**tactic.constants, "BLOCK_K": block})
