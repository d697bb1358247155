"""Products with int4 weights."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import ClassVar

from trimode.plugins.operators.norm_terms import EPSILON, NEXT_SQUARES, SQUARES, norm_tiles
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

# A group of weights that share a scale is a multiple of this, the inner size of a tensor core's multiplication.
LEAST_GROUP = 16
# Columns of one tile of the layout, weights of one word, and the longest run of K that one product of tiles covers.
TILE_COLUMNS, WORD, LONGEST_UNIT = 128, 8, 128
# Columns of a matrix of pairs: so many first ones, their second ones, the next first ones, and so on.
PAIRED = 8
# Rows whose parts of K may be summed by several programs. They have room in ``partial``.
SPLIT_ROWS = 128
MAX_SPLITS = 8
# A split has at least so many rows of the matrix, and all splits of a matrix at most so many tiles.
_LEAST_SPLIT, _MOST_TILES = 1024, 256
# Below so many tiles of 128 columns, tiles of 64 columns were faster on an H100 with 132 multiprocessors.
_ENOUGH_TILES = 200
# Most registers of a thread for sums.
_SUM_REGISTERS = 128


def unit_of(group: int) -> int:
    """Rows of W that are multiplied at once: the largest power of two that divides the group, at most 128."""
    return min(group & -group, LONGEST_UNIT)


def split_count(inner: int, columns: int, group: int) -> int:
    """Parts of K that are summed separately. It depends on the matrix alone, so that a row's sum never depends on the
    other rows of a step.
    """
    tiles, units, splits = -(-columns // TILE_COLUMNS), inner // unit_of(group), 1
    while (
        2 * splits <= MAX_SPLITS
        and units % (2 * splits) == 0
        and inner // (2 * splits) >= _LEAST_SPLIT
        and tiles * 2 * splits <= _MOST_TILES
    ):
        splits *= 2
    return splits


COUNTERS = Operand("counters", "int32", ("tiles of y",))
COUNTERS_OUT = Operand("counters_out", "int32", ("tiles of y",), aliases="counters")
PARTIAL = Operand("partial", "fp32", ("MAX_SPLITS", "SPLIT_ROWS", "N"))


def has_separate_parts(node: Node) -> bool:
    """Whether the parts of K may be separate programs. It is False only if x is known to have too many rows."""
    sizes = node.fixed["x"]
    return bool(min(sizes) < 0 or row_count(sizes) <= SPLIT_ROWS)


class Int4Product(Operator):
    """y = x W + narrow up + residual, with the terms that the operator was made with.

    With ``normed``, x is the residual stream times the norm's weight, ``squares`` are the sums of the stream's squares
    over tiles of columns (:mod:`trimode.plugins.operators.norm_terms`), and the product is divided by the root of their
    mean plus ``epsilon``. With ``for_norm``, the operator also writes these two for the norm behind it: ``weighted`` is
    y * ``next_weight``. In fp16, y * ``next_weight`` must be finite, since it is not divided before.

    With ``gated``, the columns of W are pairs in the order of :data:`PAIRED`, a gate and an up in each, and y
    [M, N / 2] is gate * sigmoid(gate) * up.

    ``packed`` [tiles, units, TILE_COLUMNS, words] holds W [K, N] for tensor cores. A tile is TILE_COLUMNS columns; the
    last one is padded. A unit is ``8 * words`` rows of W that share a scale (:func:`unit_of`). Nibble j of word w is
    n + 8 of the unit's row ``words * j + w``. ``scale`` has one fp32 factor for each group and column. So K is
    ``8 * units * words``, N is the scale's, and a group is a multiple of :data:`LEAST_GROUP`. ``narrow`` is x
    times the adapter's down matrix and its scale. The rows of ``x``, ``narrow``, ``residual`` and ``y`` may be spread
    over several dimensions.

    K is summed in :func:`split_count` parts, whose sums are added in order. With ``split``, for up to
    :data:`SPLIT_ROWS` rows, each part is a program of its own: programs leave their sums in ``partial``, and the last
    one of a tile adds them. ``counters`` are zero before a launch and after it, so all products of an engine may share
    them if their launches are ordered. All tactics give a row the same bits.
    """

    kernel = "int4_product.int4_product_kernel"
    scalars: tuple[str, ...] = ("rows",)

    # BLOCK_N divides TILE_COLUMNS: a program reads words of one tile of the layout.
    # For steps, by their rows; the last two for chunks of prompts. A tactic with STEPS is for at most SPLIT_ROWS rows:
    # where K is split, a program sums one part, so its threads need no registers for the sum of several.
    TACTICS: ClassVar[tuple[Tactic, ...]] = (
        Tactic({"BLOCK_M": 16, "BLOCK_N": 64}, warps=4, stages=5),
        Tactic({"BLOCK_M": 16, "BLOCK_N": 128}, warps=4, stages=5),
        Tactic({"BLOCK_M": 32, "BLOCK_N": 64}, warps=4, stages=4),
        Tactic({"BLOCK_M": 32, "BLOCK_N": 128}, warps=4, stages=5),
        Tactic({"BLOCK_M": 64, "BLOCK_N": 64, "STEPS": 1}, warps=4, stages=3),
        Tactic({"BLOCK_M": 64, "BLOCK_N": 128, "STEPS": 1}, warps=4, stages=3),
        Tactic({"BLOCK_M": 64, "BLOCK_N": 64}, warps=4, stages=3),
        Tactic({"BLOCK_M": 64, "BLOCK_N": 128}, warps=8, stages=3),
    )

    def __init__(
        self,
        *,
        split: bool = False,
        adapter: bool = False,
        residual: bool = False,
        normed: bool = False,
        gated: bool = False,
        for_norm: bool = False,
    ) -> None:
        terms = {"Split": split, "Normed": normed, "Adapted": adapter}
        terms |= {"Residual": residual, "Gated": gated, "ForNorm": for_norm}
        self.name = "Int4Product" + "".join(term for term, present in terms.items() if present)
        self.split = split
        self.gated = gated
        self.for_norm = for_norm
        self.inputs = (
            Operand("x", "real", ("M", "K")),
            Operand("packed", "int32", ("tiles", "units", "TILE_COLUMNS", "words")),
            Operand("scale", "fp32", ("K / group", "N")),
            *((SQUARES, EPSILON) if normed else ()),
            *((Operand("narrow", "real", ("M", "R")), Operand("adapter_up", "real", ("R", "N"))) if adapter else ()),
            *((Operand("residual", "real", ("M", "N")),) if residual else ()),
            *((Operand("next_weight", "real", ("N",)),) if for_norm else ()),
            *((COUNTERS,) if split else ()),
        )
        self.outputs = (
            Operand("y", "real", ("M", "N / 2" if gated else "N")),
            *((Operand("weighted", "real", ("M", "N")), NEXT_SQUARES) if for_norm else ()),
            *((PARTIAL, COUNTERS_OUT) if split else ()),
        )

    def node(self, *, rows: int, inner: int, columns: int, group: int = 128, rank: int = 0) -> Node:
        """rank: of the adapter, 0 without one."""
        shapes = self.product_shapes(rows=rows, inner=inner, columns=columns, group=group, rank=rank)
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs})

    def product_shapes(
        self, *, rows: int, inner: int, columns: int, group: int, rank: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """Of all inputs that such a product may have."""
        unit = unit_of(group)
        return {
            "x": (rows, inner),
            "packed": (ceil_div(columns, TILE_COLUMNS), inner // unit, TILE_COLUMNS, unit // WORD),
            "scale": (inner // group, columns),
            "squares": (norm_tiles(inner), rows),
            "epsilon": (1,),
            "next_weight": (columns,),
            "narrow": (rows, rank),
            "adapter_up": (rank, columns),
            "residual": (rows, columns),
            "counters": (self.counters(columns),),
        }

    @classmethod
    def counters(cls, columns: int) -> int:
        """The number of counters that a product with so many columns needs, in the tactic with most tiles."""
        return max(SPLIT_ROWS // rows * -(-columns // width) for rows, width in map(_shape, cls.TACTICS))

    def parts(self, node: Node) -> int:
        """Of K that are summed separately."""
        (_, units, _, words), (groups, columns) = node.fixed["packed"], node.fixed["scale"]
        inner = units * words * WORD
        return split_count(inner, columns, inner // groups)

    def constants(self, node: Node) -> Constants:
        (_, units, _, words), (groups, columns) = node.fixed["packed"], node.fixed["scale"]
        inner = units * words * WORD
        return {
            "INNER": inner,
            "COLUMNS": columns,
            "GROUP": inner // groups,
            "UNIT": words * WORD,
            "RANK": node.fixed["adapter_up"][0] if "adapter_up" in node.fixed else 0,
            "SPLITS": self.parts(node),
            "GATED": int(self.gated),
        }

    def held_tiles(self, node: Node, tactic: Tactic) -> int:
        """Tiles that threads hold at once: sums of a unit and of a part, and sums of several parts."""
        one_part = self.parts(node) == 1 or (self.split and "STEPS" in tactic.constants)
        return 2 if one_part else 3

    def compiled_tactics(self, node: Node) -> dict[int, Tactic]:
        """Those that leave registers for weights."""
        return {
            number: tactic
            for number, tactic in numbered(self.TACTICS).items()
            if self.held_tiles(node, tactic) * math.prod(_shape(tactic)) <= _SUM_REGISTERS * 32 * tactic.warps
        }

    def tactics(self, node: Node) -> dict[int, Tactic]:
        sizes = node.fixed["x"]
        is_step = min(sizes) >= 0 and has_separate_parts(node)
        return {n: t for n, t in self.compiled_tactics(node).items() if is_step or "STEPS" not in t.constants}

    def default_tactic(self, node: Node, emitted: Collection[int]) -> int:
        """The tactic for a launch that was not timed. emitted: the tactics that the GPU has kernels of.

        By measurements on an H100: the smallest tile that holds all rows, or else the tile of 64 rows; narrow tiles for
        narrow matrices, and for chunks of prompts if K is split.
        """
        rows, parts = self.rows(node), self.parts(node)
        shapes = {_shape(tactic): n for n, tactic in reversed(self.tactics(node).items()) if n in emitted}
        tiles = ceil_div(self.constants(node)["COLUMNS"], TILE_COLUMNS)
        wide = parts == 1 if rows > SPLIT_ROWS else tiles * parts >= _ENOUGH_TILES
        block_n = 128 if wide else 64
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        # Without the wanted kernel, the one with the next smaller or else the next larger tile.
        return shapes[min(shapes, key=lambda shape: (shape[0] > block_m, abs(shape[0] - block_m), shape[1] != block_n))]

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each tile of rows, tile of columns and, if they are separate, part of K; the tiles of rows that
        share weights are neighbours.
        """
        rows, constants, (block_m, block_n) = self.rows(node), self.constants(node), _shape(tactic)
        parts = self.parts(node) if self.split and has_separate_parts(node) else 1
        return ceil_div(rows, block_m), ceil_div(constants["COLUMNS"], block_n), parts

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        return (self.rows(node),)

    @staticmethod
    def rows(node: Node) -> Dim:
        return row_count(node.shapes["x"])

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        columns = node.shapes["scale"][1]
        y = (*list(node.shapes["x"])[:-1], columns // 2 if self.gated else columns)
        terms = [y, (norm_tiles(columns), self.rows(node))] if self.for_norm else []
        parts = [(MAX_SPLITS, SPLIT_ROWS, columns), tuple(node.shapes["counters"])] if self.split else []
        return [y, *terms, *parts]


def _shape(tactic: Tactic) -> tuple[int, int]:
    return tactic.constants["BLOCK_M"], tactic.constants["BLOCK_N"]
