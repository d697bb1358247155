"""What each operator of the ``trimode`` domain takes and gives, and how its kernel is launched. No kernel is imported.

An operator is one kernel. A kernel's parameters are the operator's inputs, then its ``scalars`` (32-bit integers taken
from shapes), then its outputs, all in the order given here, then its compile-time constants by name; a parameter of the
kernel that the operator lacks is the constant None. Every tensor is
contiguous, and a pointer is aligned to 16 bytes. Grids come from shapes alone, so one CUDA graph serves all lengths.

Shapes are written in these letters: B sequences, S tokens of the step, HQ query heads, HKV key-value heads, D head
size, C rows of the KV pool, P splits of the KV pool, M rows of a product (B * S), K its inner size, N its columns,
R the adapter's rank. ``real`` is the type of the activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

ElementType = Literal["real", "fp32", "int64", "bool", "int8"]
Pattern = Literal["causal", "bidirectional", "masked"]
Constants = dict[str, int | bool | str | None]

# A shape's dimension: an integer, or a symbol that a compiler computes with.
Dim = Any

DOMAIN = "trimode"
# What a tensor core multiplies at once along the inner dimension.
LEAST_GROUP = 16
# Steps up to this length have all splits; longer ones have rows enough to fill the chip, and fewer splits.
SPLIT_STEP = 64


class Operand(NamedTuple):
    """``aliases``: the input whose memory an output is."""

    name: str
    type: ElementType
    shape: tuple[str, ...]
    aliases: str | None = None


@dataclass(frozen=True)
class Operator:
    """``kernel``: the function in ``trimode.plugins`` that computes it. ``attributes``: integers no shape tells."""

    name: str
    inputs: tuple[Operand, ...]
    scalars: tuple[str, ...]
    outputs: tuple[Operand, ...]
    kernel: str
    attributes: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*(i.name for i in self.inputs), *self.scalars, *(o.name for o in self.outputs))


@dataclass(frozen=True)
class Tactic:
    """A kernel's block sizes, by the names of its compile-time constants, and its launch: what a GPU's own timing
    chooses among."""

    constants: Constants = field(hash=False)
    warps: int
    stages: int


@dataclass(frozen=True)
class AttentionShape:
    """What attention's kernels are compiled for. group: query heads that share a key-value head. splits: parts of a
    sequence's KV rows that are attended to at once."""

    kv_heads: int
    group: int
    head_dim: int
    splits: int


@dataclass(frozen=True)
class ProductShape:
    """What a product is compiled for: ``columns`` is even, ``inner`` a multiple of ``group``, and that of
    :data:`LEAST_GROUP`. rank: 0 without adapter. input_scale, residual: whether the operator has that input."""

    inner: int
    columns: int
    group: int = 128
    input_scale: bool = False
    rank: int = 0
    residual: bool = False


def ceil_div(a: Dim, b: Dim) -> Dim:
    return (a + (b - 1)) // b


def split_count(splits: int, step: Dim) -> Dim:
    """P, the splits that a step of that length is launched with."""
    return ceil_div(splits, ceil_div(step, SPLIT_STEP))


# --- KV write: qkv rows to rotated queries, and rotated keys and values to the pool --------------------------------

_ROTATION = ("B", "S", "D / 2")
_CACHE = ("B", "HKV", "C", "D")

KV_WRITE = Operator(
    name="KvWrite",
    inputs=(
        Operand("qkv", "real", ("B", "S", "(HQ + 2 HKV) D")),
        # YaRN's cos and sin; the queries' carry the position's and the softmax's scale.
        Operand("query_cos", "real", _ROTATION),
        Operand("query_sin", "real", _ROTATION),
        Operand("key_cos", "real", _ROTATION),
        Operand("key_sin", "real", _ROTATION),
        Operand("write_indices", "int64", ("B",)),
        Operand("k_cache", "real", _CACHE),
        Operand("v_cache", "real", _CACHE),
    ),
    scalars=("step", "capacity"),
    outputs=(
        Operand("q", "real", ("B", "HQ", "S", "D")),
        Operand("k_cache_out", "real", _CACHE, aliases="k_cache"),
        Operand("v_cache_out", "real", _CACHE, aliases="v_cache"),
    ),
    kernel="kv_write.kv_write_kernel",
)


def kv_write_grid(batch: Dim, step: Dim) -> tuple[Dim, Dim, Dim]:
    return step, batch, 1


def kv_write_constants(shape: AttentionShape) -> Constants:
    return {"KV_HEADS": shape.kv_heads, "GROUP": shape.group, "HEAD_DIM": shape.head_dim}


KV_WRITE_TACTICS = (Tactic({}, warps=4, stages=1), Tactic({}, warps=8, stages=1))

# --- Attention over the pool, which holds the step's own rows already ----------------------------------------------


def attend(pattern: Pattern) -> Operator:
    """Attention of each query to each split of its sequence's KV rows. ``partial`` is normalised within its split;
    a split whose ``log_sum_exp`` is -inf saw nothing, and its ``partial`` is not written.

    causal: token i sees the committed rows and the step's rows to i. bidirectional: the committed rows and the step's
    first ``step_lengths``. masked: the committed rows and those of the step that ``block_mask`` names.
    """
    visibility: dict[Pattern, tuple[Operand, ...]] = {
        "causal": (),
        "bidirectional": (Operand("step_lengths", "int64", ("B",)),),
        "masked": (Operand("block_mask", "bool", ("B", "S", "S")),),
    }
    return Operator(
        name=f"Attend{pattern.capitalize()}",
        inputs=(
            Operand("q", "real", ("B", "HQ", "S", "D")),
            Operand("k_cache", "real", _CACHE),
            Operand("v_cache", "real", _CACHE),
            Operand("write_indices", "int64", ("B",)),
            *visibility[pattern],
        ),
        scalars=("step", "capacity"),
        outputs=(
            Operand("partial", "real", ("B", "P", "HQ", "S", "D")),
            Operand("log_sum_exp", "fp32", ("B", "P", "HQ", "S")),
        ),
        kernel="attention.attend_kernel",
        attributes=("splits",),
    )


def attend_grid(shape: AttentionShape, tactic: Tactic, batch: Dim, step: Dim) -> tuple[Dim, Dim, Dim]:
    tiles = ceil_div(step * shape.group, tactic.constants["BLOCK_M"])
    return tiles, split_count(shape.splits, step) * shape.kv_heads, batch


def attend_constants(shape: AttentionShape) -> Constants:
    return {"KV_HEADS": shape.kv_heads, "GROUP": shape.group, "HEAD_DIM": shape.head_dim}


# BLOCK_S: rows of a masked tile. A tile of 128 rows holds a step of 32 with groups of 4, and reads K and V once for it.
ATTEND_TACTICS = (
    Tactic({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_S": 16, "MIN_ROWS": 128}, warps=4, stages=2),
    Tactic({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_S": 16, "MIN_ROWS": 256}, warps=4, stages=2),
    Tactic({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_S": 16, "MIN_ROWS": 256}, warps=8, stages=2),
)

MERGE = Operator(
    name="MergeSplits",
    inputs=(
        Operand("partial", "real", ("B", "P", "HQ", "S", "D")),
        Operand("log_sum_exp", "fp32", ("B", "P", "HQ", "S")),
    ),
    scalars=("step", "splits"),
    outputs=(Operand("attended", "real", ("B", "S", "HQ D")),),
    kernel="attention.merge_kernel",
    attributes=("splits", "group"),
)


def merge_grid(shape: AttentionShape, batch: Dim, step: Dim) -> tuple[Dim, Dim, Dim]:
    return step, shape.kv_heads, batch


def merge_constants(shape: AttentionShape) -> Constants:
    return {**attend_constants(shape), "SPLITS": 1 << (shape.splits - 1).bit_length()}


MERGE_TACTICS = (Tactic({}, warps=2, stages=1), Tactic({}, warps=4, stages=1))

# --- Products with int4 weights --------------------------------------------------------------------------------------


def int4_product(shape: ProductShape) -> Operator:
    """y = (x * input_scale) W + narrow up + residual, the terms that the shape has.

    ``packed`` has the bytes of the pool's ONNX INT4 matrix [K, N]: the low nibble is the even column. ``narrow`` is
    x times the adapter's down matrix and its scale, a product small enough for any library.
    """
    return Operator(
        name="Int4Product"
        + ("Scaled" if shape.input_scale else "")
        + ("Adapted" if shape.rank else "")
        + ("Residual" if shape.residual else ""),
        inputs=(
            Operand("x", "real", ("M", "K")),
            Operand("packed", "int8", ("K", "N / 2")),
            Operand("scale", "real", ("K / group", "N")),
            *((Operand("input_scale", "real", ("K",)),) if shape.input_scale else ()),
            *((Operand("narrow", "real", ("M", "R")), Operand("adapter_up", "real", ("R", "N"))) if shape.rank else ()),
            *((Operand("residual", "real", ("M", "N")),) if shape.residual else ()),
        ),
        scalars=("rows",),
        outputs=(Operand("y", "real", ("M", "N")),),
        kernel="int4_product.int4_product_kernel",
    )


def int4_product_grid(shape: ProductShape, tactic: Tactic, rows: Dim) -> tuple[Dim, Dim, Dim]:
    """The rows' tiles that share weights run side by side."""
    constants = tactic.constants
    return ceil_div(rows, constants["BLOCK_M"]), ceil_div(shape.columns, constants["BLOCK_N"]), 1


def int4_product_constants(shape: ProductShape) -> Constants:
    return {"INNER": shape.inner, "COLUMNS": shape.columns, "GROUP": shape.group, "RANK": shape.rank}


# BLOCK_M up to 4 multiplies without tensor cores. Where a tile has few rows, so many columns a warp that no two warps
# unpack the same weights.
INT4_PRODUCT_TACTICS = (
    Tactic({"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 32}, warps=4, stages=4),
    Tactic({"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=4),
    Tactic({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}, warps=2, stages=4),
    Tactic({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64}, warps=4, stages=4),
    Tactic({"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64}, warps=2, stages=4),
    Tactic({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, warps=4, stages=3),
    Tactic({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=3),
)


def within_group(tactic: Tactic, group: int) -> Tactic:
    """A product's tactic for groups of this size: a tile along the inner dimension lies in one."""
    block = math.gcd(int(tactic.constants["BLOCK_K"] or 0), group)
    return replace(tactic, constants={**tactic.constants, "BLOCK_K": block})
