"""Products with weights that are not quantised."""

from __future__ import annotations

from typing import ClassVar

from trimode.plugins.operators.int4_product import (
    COUNTERS,
    COUNTERS_OUT,
    MAX_SPLITS,
    PARTIAL,
    SPLIT_ROWS,
    has_separate_parts,
)
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

# A part of K has at least so many columns of x. Matrices of at most so many columns are split.
_LEAST_PART, _FEW_COLUMNS = 512, 256


def dense_split_count(inner: int, columns: int) -> int:
    """Parts of K that are summed separately. It depends on the matrix alone."""
    splits = 1
    while (
        columns <= _FEW_COLUMNS
        and 2 * splits <= MAX_SPLITS
        and inner % (2 * splits) == 0
        and inner // (2 * splits) >= _LEAST_PART
    ):
        splits *= 2
    return splits


class DenseProduct(Operator):
    """y = (x W) * row_scale + narrow up + residual, with the terms that the operator was made with.

    ``weight`` is W, [K, N], as in the weight pool. ``row_scale`` has one factor for each sequence; ``x`` is then
    [B, S, K]. ``narrow`` is x times the adapter's down matrix and its scale. Without ``row_scale``, the rows of ``x``,
    ``narrow``, ``residual`` and ``y`` may be spread over several dimensions. ``split``, ``partial`` and ``counters``:
    as for :class:`trimode.plugins.operators.int4_product.Int4Product`.
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

    def __init__(
        self, *, split: bool = False, row_scale: bool = False, adapter: bool = False, residual: bool = False
    ) -> None:
        terms = {"Split": split, "RowScaled": row_scale, "Adapted": adapter, "Residual": residual}
        self.name = "DenseProduct" + "".join(term for term, present in terms.items() if present)
        self.split = split
        self.row_scale = row_scale
        rows = ("B", "S") if row_scale else ("M",)
        self.inputs = (
            Operand("x", "real", (*rows, "K")),
            Operand("weight", "real", ("K", "N")),
            *((Operand("row_scale", "real", ("B",)),) if row_scale else ()),
            *((Operand("narrow", "real", (*rows, "R")), Operand("adapter_up", "real", ("R", "N"))) if adapter else ()),
            *((Operand("residual", "real", (*rows, "N")),) if residual else ()),
            *((COUNTERS,) if split else ()),
        )
        self.scalars = ("rows", "step") if row_scale else ("rows",)
        self.outputs = (
            Operand("y", "real", (*rows, "N")),
            *((PARTIAL, COUNTERS_OUT) if split else ()),
        )

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
            "counters": (self.counters(columns),),
        }
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs})

    @classmethod
    def counters(cls, columns: int) -> int:
        """The number of counters that a product with so many columns needs, in the tactic with most tiles."""
        shapes = [(tactic.constants["BLOCK_M"], tactic.constants["BLOCK_N"]) for tactic in cls.TACTICS]
        return max(SPLIT_ROWS // rows * -(-columns // width) for rows, width in shapes)

    def constants(self, node: Node) -> Constants:
        inner, columns = node.fixed["weight"]
        rank = node.fixed["adapter_up"][0] if "adapter_up" in node.fixed else 0
        splits = dense_split_count(inner, columns) if self.split else 1
        return {"INNER": inner, "COLUMNS": columns, "RANK": rank, "SPLITS": splits}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each tile of rows, tile of columns and, if they are separate, part of K; the tiles of rows that
        share weights are neighbours.
        """
        rows, constants = row_count(node.shapes["x"]), self.constants(node)
        block_m, block_n = tactic.constants["BLOCK_M"], tactic.constants["BLOCK_N"]
        parts = constants["SPLITS"] if has_separate_parts(node) else 1
        return ceil_div(rows, block_m), ceil_div(constants["COLUMNS"], block_n), parts

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        rows = row_count(node.shapes["x"])
        return (rows, node.shapes["x"][1]) if self.row_scale else (rows,)

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        columns = node.shapes["weight"][1]
        parts = [(MAX_SPLITS, SPLIT_ROWS, columns), tuple(node.shapes["counters"])] if self.split else []
        return [(*list(node.shapes["x"])[:-1], columns), *parts]
