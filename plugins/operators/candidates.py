"""From a head's tiles to what the host needs: the best candidates of each row, and their log-sum-exp."""

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

# Tokens of a tile. A product's tile of columns is one or several of them.
TILE = 64
# The logit of a token that is not legal, and the log-sum-exp of no legal tokens. Far below any logit, so that its
# exponential is 0, and finite, so that no operation on it gives NaN.
NEVER = -1e30
# Most candidates of a row.
MOST_CANDIDATES = 64

# Of a tile: the logit and the id of its best token, and the log-sum-exp of its legal tokens.
TILES = (
    Operand("tile_logits", "fp32", ("B", "L", "T")),
    Operand("tile_tokens", "int32", ("B", "L", "T")),
    Operand("tile_sums", "fp32", ("B", "L", "T")),
)
# Every token's logit, NEVER if it is not legal. Empty for one candidate, which the tiles suffice for.
LOGITS = Operand("logits", "fp32", ("B", "L", "V or 0"))


class MergeCandidates(Operator):
    """The ``top_k`` best tokens of a row, best first, equal ones by their ids, and the log-sum-exp of the row.

    The best of all tiles' best tokens is the row's best one. In its place, its tile then offers the best of the tile's
    other tokens, and so on. So only the tiles with candidates are read.
    """

    name = "MergeCandidates"
    kernel = "candidates.merge_candidates_kernel"
    inputs = (*TILES, LOGITS)
    scalars = ()
    outputs = (
        Operand("top_logits", "fp32", ("B", "L", "k")),
        Operand("top_tokens", "int64", ("B", "L", "k")),
        Operand("log_sum_exp", "fp32", ("B", "L")),
    )
    attributes = ("top_k",)

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({}, warps=4, stages=1), Tactic({}, warps=8, stages=1))

    @staticmethod
    def node(*, batch: int, rows: int, vocabulary: int, top_k: int) -> Node:
        tiles = ceil_div(vocabulary, TILE)
        logits = (batch, rows, listed_logits(vocabulary, top_k))
        shapes = {**{operand.name: (batch, rows, tiles) for operand in TILES}, "logits": logits}
        return Node.of(shapes, {"top_k": top_k})

    def constants(self, node: Node) -> Constants:
        tiles, vocabulary = node.fixed["tile_sums"][2], node.fixed["logits"][2]
        return {"TILES": tiles, "VOCABULARY": vocabulary, "TOP_K": node.attributes["top_k"]}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, _tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each row."""
        return row_count(node.shapes["tile_sums"]), 1, 1

    def scalar_values(self, _node: Node) -> tuple[Dim, ...]:
        return ()

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        batch, rows, _ = node.shapes["tile_sums"]
        candidates = (batch, rows, node.attributes["top_k"])
        return [candidates, candidates, (batch, rows)]


def listed_logits(vocabulary: Dim, top_k: int) -> Dim:
    """Logits of a row that a head writes for so many candidates."""
    return vocabulary if top_k > 1 else 0
