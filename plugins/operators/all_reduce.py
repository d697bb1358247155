"""The sum of all ranks' partial sums of a product, with the residual stream and the terms of the norm behind it."""

from __future__ import annotations

from typing import ClassVar

from trimode.plugins.operators.norm_terms import NEXT_SQUARES, norm_tiles
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

# Exchange memory of a rank, which all ranks read and write: words of 32 bits, then the partial sums.
MOST_RANKS = 8
# The number of the last sum that rank i has begun is word i. The others are this rank's own: the number of the last sum
# that it has completed, and the programs of the current sum that have begun and ended.
EPOCH, BEGUN, ENDED = 32, 64, 96
EXCHANGE_HEADER = 512  # bytes


class AllReduce(Operator):
    """x = residual + the sum of ``partial`` over all ranks, in fp32 and in the order of ranks, rounded once.

    Every rank launches it for every sum, in the same order. ``ranks`` holds the addresses of the exchange memory of
    each rank, in order, and then this rank's number. ``partial`` lies in this rank's exchange memory, at the same
    offset on every rank. Consecutive sums alternate between two offsets: a rank overwrites a partial sum only after all
    ranks have begun the sum behind it, and so have read it.

    ``for_norm``: as for :class:`trimode.plugins.operators.int4_product.Int4Product`.
    """

    kernel = "all_reduce.all_reduce_kernel"
    scalars = ("rows",)

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({"BLOCK_M": 4, "BLOCK_N": 256}, warps=4, stages=1),)

    def __init__(self, *, for_norm: bool = False) -> None:
        self.name = "AllReduceForNorm" if for_norm else "AllReduce"
        self.for_norm = for_norm
        row = ("B", "S", "H")
        self.inputs = (
            Operand("partial", "real", row),
            Operand("ranks", "int64", ("N + 1",)),
            Operand("residual", "real", row),
            *((Operand("next_weight", "real", ("H",)),) if for_norm else ()),
        )
        self.outputs = (
            Operand("x", "real", row),
            *((Operand("weighted", "real", row), NEXT_SQUARES) if for_norm else ()),
        )

    def node(self, *, batch: int, step: int, width: int, ranks: int) -> Node:
        row = (batch, step, width)
        shapes = {"partial": row, "ranks": (ranks + 1,), "residual": row, "next_weight": (width,)}
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs})

    def constants(self, node: Node) -> Constants:
        return {"WIDTH": node.fixed["residual"][-1], "RANKS": node.fixed["ranks"][0] - 1}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each tile of rows and columns."""
        rows, width = row_count(node.shapes["partial"]), self.constants(node)["WIDTH"]
        return ceil_div(rows, tactic.constants["BLOCK_M"]), ceil_div(width, tactic.constants["BLOCK_N"]), 1

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        return (row_count(node.shapes["partial"]),)

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        row = tuple(node.shapes["partial"])
        terms = [row, (norm_tiles(row[-1]), row_count(row))] if self.for_norm else []
        return [row, *terms]
