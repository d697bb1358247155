"""The embedding of tokens."""

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
)


class Embed(Operator):
    """The rows of ``table`` that ``input_ids`` name. Every id is a row of the table; the kernel does not check it.

    ``for_norm``: as for :class:`trimode.plugins.operators.int4_product.Int4Product`.
    """

    kernel = "embed.embed_kernel"
    scalars = ("tokens",)

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({"BLOCK": 1024}, warps=4, stages=1),)

    def __init__(self, *, for_norm: bool = False) -> None:
        self.name = "EmbedForNorm" if for_norm else "Embed"
        self.for_norm = for_norm
        row = ("B", "S", "H")
        self.inputs = (
            Operand("input_ids", "int64", ("B", "S")),
            Operand("table", "real", ("V", "H")),
            *((Operand("next_weight", "real", ("H",)),) if for_norm else ()),
        )
        self.outputs = (
            Operand("embedded", "real", row),
            *((Operand("weighted", "real", row), NEXT_SQUARES) if for_norm else ()),
        )

    def node(self, *, batch: int, step: int, vocabulary: int, width: int) -> Node:
        shapes = {"input_ids": (batch, step), "table": (vocabulary, width), "next_weight": (width,)}
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs})

    def constants(self, node: Node) -> Constants:
        return {"WIDTH": node.fixed["table"][1]}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each token and BLOCK columns."""
        batch, step = node.shapes["input_ids"]
        return batch * step, ceil_div(self.constants(node)["WIDTH"], tactic.constants["BLOCK"]), 1

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        batch, step = node.shapes["input_ids"]
        return (batch * step,)

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        row, (tokens,) = (*node.shapes["input_ids"], node.shapes["table"][1]), self.scalar_values(node)
        terms = [row, (norm_tiles(row[-1]), tokens)] if self.for_norm else []
        return [row, *terms]
