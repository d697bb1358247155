"""From logits to what the host needs: the best candidates of each row, their log-sum-exp, and asked logits.

The candidates are found in two operators, so that many programs share a row: the best of each tile of :data:`TILE`
tokens, then the best of all tiles.
"""

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

# Tokens of a tile.
TILE = 2048
# The logit of a token that is not legal, and the log-sum-exp of no legal tokens. Far below any logit, so that its
# exponential is 0, and finite, so that no operation on it gives NaN.
NEVER = -1e30
# Most candidates of a row.
MOST_CANDIDATES = 64

_WORD = 32
_LOGITS = Operand("logits", "real", ("B", "L", "V"))
_TILE_LOGITS = Operand("tile_logits", "fp32", ("B", "L", "T", "k"))
_TILE_TOKENS = Operand("tile_tokens", "int32", ("B", "L", "T", "k"))
_TILE_SUMS = Operand("tile_sums", "fp32", ("B", "L", "T"))


class TopCandidates(Operator):
    """The ``top_k`` best tokens of each tile, best first, equal ones by their ids, and the tile's log-sum-exp.

    Bit i % 32 of word i // 32 of ``token_mask`` is set if token i is legal. Without a mask, all are. Token
    ``mask_token`` never is. The logit of other tokens, and of tokens past V in the last tile, is :data:`NEVER`; the
    log-sum-exp is over the legal tokens.
    """

    kernel = "candidates.top_candidates_kernel"
    scalars = ()
    outputs = (_TILE_LOGITS, _TILE_TOKENS, _TILE_SUMS)
    attributes = ("top_k", "mask_token")

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({}, warps=4, stages=1), Tactic({}, warps=8, stages=1))

    def __init__(self, *, masked: bool = False) -> None:
        self.masked = masked
        self.name = "TopCandidatesMasked" if masked else "TopCandidates"
        self.inputs = (_LOGITS, *((Operand("token_mask", "int32", ("B", "L", "V / 32")),) if masked else ()))

    def node(self, *, batch: int, rows: int, vocabulary: int, top_k: int, mask_token: int) -> Node:
        shapes = {"logits": (batch, rows, vocabulary), "token_mask": (batch, rows, ceil_div(vocabulary, _WORD))}
        attributes = {"top_k": top_k, "mask_token": mask_token}
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs}, attributes)

    def constants(self, node: Node) -> Constants:
        top_k, mask_token = node.attributes["top_k"], node.attributes["mask_token"]
        return {"VOCABULARY": node.fixed["logits"][2], "TOP_K": top_k, "MASK_TOKEN": mask_token}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, _tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each tile of each row."""
        return ceil_div(self.constants(node)["VOCABULARY"], TILE), row_count(node.shapes["logits"]), 1

    def scalar_values(self, _node: Node) -> tuple[Dim, ...]:
        return ()

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        batch, rows, vocabulary = node.shapes["logits"]
        tiles = ceil_div(vocabulary, TILE)
        candidates = (batch, rows, tiles, node.attributes["top_k"])
        return [candidates, candidates, (batch, rows, tiles)]


class MergeCandidates(Operator):
    """The ``top_k`` best of the tiles' candidates, best first, equal ones by their ids, and the row's log-sum-exp."""

    name = "MergeCandidates"
    kernel = "candidates.merge_candidates_kernel"
    inputs = (_TILE_LOGITS, _TILE_TOKENS, _TILE_SUMS)
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
        shapes = {
            **dict.fromkeys(("tile_logits", "tile_tokens"), (batch, rows, tiles, top_k)),
            "tile_sums": (batch, rows, tiles),
        }
        return Node.of(shapes, {"top_k": top_k})

    def constants(self, node: Node) -> Constants:
        return {"TILES": node.fixed["tile_sums"][2], "TOP_K": node.attributes["top_k"]}

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


class AskedLogits(Operator):
    """The logits of the tokens ``asked_ids``, whether they are legal or not. Every id is below V; the kernel does not
    check it.
    """

    name = "AskedLogits"
    kernel = "candidates.asked_logits_kernel"
    inputs = (_LOGITS, Operand("asked_ids", "int64", ("B", "L", "A")))
    scalars = ("rows", "asked")
    outputs = (Operand("asked_logits", "fp32", ("B", "L", "A")),)

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({"BLOCK": 128}, warps=4, stages=1),)

    @staticmethod
    def node(*, batch: int, rows: int, vocabulary: int, asked: int) -> Node:
        return Node.of({"logits": (batch, rows, vocabulary), "asked_ids": (batch, rows, asked)})

    def constants(self, node: Node) -> Constants:
        return {"VOCABULARY": node.fixed["logits"][2]}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each BLOCK ids of all rows together."""
        rows, asked = self.scalar_values(node)
        return ceil_div(rows * asked, tactic.constants["BLOCK"]), 1, 1

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        return row_count(node.shapes["asked_ids"]), node.shapes["asked_ids"][2]

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        return [tuple(node.shapes["asked_ids"])]
