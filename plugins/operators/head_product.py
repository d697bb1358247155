"""Heads: the products whose columns are the logits of tokens, with what follows the logits.

A program reduces its logits before it writes anything: to the best token and the log-sum-exp of each tile of tokens.
For one candidate of a row, logits never reach memory.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from trimode.plugins.operators.candidates import LOGITS, TILE, TILES, listed_logits
from trimode.plugins.operators.int4_product import Int4Product
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

_WORD = 32
_INPUT = Operand("x", "real", ("B", "L", "K"))
_TOKEN_MASK = Operand("token_mask", "int32", ("B", "L", "V / 32"))
_ASKED_IDS = Operand("asked_ids", "int64", ("B", "L", "A"))
_OUTPUTS = (*TILES, LOGITS, Operand("asked_logits", "fp32", ("B", "L", "A")))
_SCALARS = ("rows", "asked")


class Int4Head(Int4Product):
    """The tiles of the logits x W, and asked logits.

    x, packed, scale, squares, epsilon and ``normed``: as for :class:`Int4Product`; K is summed in one part. Bit i % 32
    of word i // 32 of ``token_mask`` is set if token i is legal; without ``masked``, all are. Token ``mask_token``
    never is. ``asked_logits`` are those of the tokens ``asked_ids``, legal or not; every id is below V, which the
    kernel does not check. A may be 0. ``top_k``: the candidates of a row that the tiles are for.

    Logits are fp32 and are not rounded to the type of the activations. All tactics give a row the same bits.
    """

    kernel = "head_product.int4_head_kernel"
    scalars = _SCALARS
    attributes = ("top_k", "mask_token")
    TACTICS = tuple(tactic for tactic in Int4Product.TACTICS if "STEPS" not in tactic.constants)

    def __init__(self, *, normed: bool = False, masked: bool = False) -> None:
        super().__init__(normed=normed)
        self.masked = masked
        self.name = "Int4Head" + "Normed" * normed + "Masked" * masked
        _, *weights = self.inputs
        self.inputs = (_INPUT, *weights, *((_TOKEN_MASK,) if masked else ()), _ASKED_IDS)
        self.outputs = _OUTPUTS

    @property
    def unmasked(self) -> Int4Head:
        """The same without a mask of legal tokens."""
        return Int4Head(normed="Normed" in self.name)

    def head_node(
        self, *, batch: int, rows: int, inner: int, vocabulary: int, top_k: int, mask_token: int, asked: int = 0,
        group: int = 128,
    ) -> Node:  # fmt: skip
        product = self.product_shapes(rows=batch * rows, inner=inner, columns=vocabulary, group=group)
        shapes = {**product, **_other_shapes(batch, rows, inner, vocabulary, asked)}
        attributes = {"top_k": top_k, "mask_token": mask_token}
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs}, attributes)

    def parts(self, _node: Node) -> int:
        return 1

    def held_tiles(self, _node: Node, _tactic: Tactic) -> int:
        """Of logits, of legal ones, and of exponentials."""
        return 3

    def constants(self, node: Node) -> Constants:
        product = super().constants(node)
        kept = {name: product[name] for name in ("INNER", "COLUMNS", "GROUP", "UNIT")}
        return {**kept, **_constants(node)}

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        return row_count(node.shapes["x"]), node.shapes["asked_ids"][2]

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        return _output_shapes(node, node.shapes["scale"][1])


class DenseHead(Operator):
    """As :class:`Int4Head`, with W [K, V] as in the weight pool and x the normed rows."""

    kernel = "head_product.dense_head_kernel"
    scalars = _SCALARS
    attributes = ("top_k", "mask_token")
    outputs = _OUTPUTS

    # One number of inner columns, so that all tiles sum in one order.
    TACTICS: ClassVar[tuple[Tactic, ...]] = (
        Tactic({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}, warps=4, stages=4),
        Tactic({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64}, warps=4, stages=4),
        Tactic({"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64}, warps=4, stages=4),
        Tactic({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=3),
    )

    def __init__(self, *, masked: bool = False) -> None:
        self.masked = masked
        self.name = "DenseHead" + "Masked" * masked
        weight = Operand("weight", "real", ("K", "V"))
        self.inputs = (_INPUT, weight, *((_TOKEN_MASK,) if masked else ()), _ASKED_IDS)

    @property
    def unmasked(self) -> DenseHead:
        """The same without a mask of legal tokens."""
        return DenseHead()

    def head_node(
        self, *, batch: int, rows: int, inner: int, vocabulary: int, top_k: int, mask_token: int, asked: int = 0
    ) -> Node:
        shapes = {"weight": (inner, vocabulary), **_other_shapes(batch, rows, inner, vocabulary, asked)}
        attributes = {"top_k": top_k, "mask_token": mask_token}
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs}, attributes)

    def constants(self, node: Node) -> Constants:
        inner, columns = node.fixed["weight"]
        return {"INNER": inner, "COLUMNS": columns, **_constants(node)}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def default_tactic(self, node: Node, emitted: Collection[int]) -> int:
        """The smallest tile that holds all rows, and of those the widest; if none does, the largest."""
        tactics, rows = self.tactics(node), row_count(node.shapes["x"])
        heights = {number: tactics[number].constants["BLOCK_M"] for number in emitted}
        height = min((height for height in heights.values() if height >= rows), default=max(heights.values()))
        return max(number for number in emitted if heights[number] == height)

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each tile of rows and tile of columns; the tiles of rows that share weights are neighbours."""
        rows, columns = row_count(node.shapes["x"]), self.constants(node)["COLUMNS"]
        return ceil_div(rows, tactic.constants["BLOCK_M"]), ceil_div(columns, tactic.constants["BLOCK_N"]), 1

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        return row_count(node.shapes["x"]), node.shapes["asked_ids"][2]

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        return _output_shapes(node, node.shapes["weight"][1])


Head = Int4Head | DenseHead


def _other_shapes(batch: int, rows: int, inner: int, vocabulary: int, asked: int) -> dict[str, tuple[int, ...]]:
    """Of the inputs that all heads have."""
    return {
        "x": (batch, rows, inner),
        "token_mask": (batch, rows, ceil_div(vocabulary, _WORD)),
        "asked_ids": (batch, rows, asked),
    }


def _constants(node: Node) -> Constants:
    return {"MASK_TOKEN": node.attributes["mask_token"], "LISTED": int(node.attributes["top_k"] > 1)}


def _output_shapes(node: Node, vocabulary: Dim) -> list[tuple[Dim, ...]]:
    batch, rows, _ = node.shapes["x"]
    tiles = (batch, rows, ceil_div(vocabulary, TILE))
    logits = (batch, rows, listed_logits(vocabulary, node.attributes["top_k"]))
    return [tiles, tiles, tiles, logits, (batch, rows, node.shapes["asked_ids"][2])]
