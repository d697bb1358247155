"""Attention over the KV pool in two operators: one over splits of the KV rows, one that merges the splits.

The pool holds the step's own rows already.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from trimode.plugins.operators.operator import Constants, Dim, Node, Operand, Operator, Tactic, ceil_div, numbered

Pattern = Literal["causal", "bidirectional", "masked"]

# Steps up to this length are launched with all splits. Longer ones have enough rows to fill the GPU with fewer.
SPLIT_STEP = 64
# KV rows of a tile. Tiles are dealt to the splits in turn, so short contexts also have work for several splits.
KV_TILE = 32

_CACHE = ("B", "HKV", "C", "D")
_PARTIAL = Operand("partial", "real", ("B", "P", "HQ", "S", "D"))
_LOG_SUM_EXP = Operand("log_sum_exp", "fp32", ("B", "P", "HQ", "S"))
ATTENDED = Operand("attended", "real", ("B", "S", "HQ D"))
_OUTPUT_SCALE = Operand("output_scale", "fp32", ("HQ D",))
_VISIBILITY: dict[Pattern, tuple[Operand, ...]] = {
    "causal": (),
    "bidirectional": (Operand("step_lengths", "int64", ("B",)),),
    "masked": (Operand("block_mask", "bool", ("B", "S", "S")),),
}


class Attend(Operator):
    """Attention of each query over each split of its sequence's KV rows.

    pattern ``causal``: token i attends to the committed rows and the step's rows up to i. ``bidirectional``: to the
    committed rows and the step's first ``step_lengths`` rows. ``masked``: to the committed rows, and to the rows of the
    step for which ``block_mask`` is true.

    ``partial`` is normalised within its split. ``log_sum_exp`` is -inf for a split without an attended row, and its
    ``partial`` is not written. Attribute ``splits``: the number of splits of a step of up to :data:`SPLIT_STEP` tokens.
    """

    kernel = "attention.attend_kernel"
    scalars = ("step", "capacity")
    outputs = (_PARTIAL, _LOG_SUM_EXP)
    attributes = ("splits",)

    # BLOCK_M: queries of a tile; 128 hold a step of 32 tokens with groups of 4, so that K and V are read once for them.
    # BLOCK_N: KV rows of a tile. The tile of 16 queries is for types and GPUs that the others do not fit; it uses other
    # instructions of the tensor cores, which may round differently.
    TACTICS: ClassVar[tuple[Tactic, ...]] = (
        Tactic({"BLOCK_M": 64, "BLOCK_N": KV_TILE}, warps=4, stages=4),
        Tactic({"BLOCK_M": 128, "BLOCK_N": KV_TILE}, warps=8, stages=4),
        Tactic({"BLOCK_M": 16, "BLOCK_N": KV_TILE}, warps=4, stages=2),
    )

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.name = f"Attend{pattern.capitalize()}"
        self.inputs = (
            Operand("q", "real", ("B", "HQ", "S", "D")),
            Operand("k_cache", "real", _CACHE),
            Operand("v_cache", "real", _CACHE),
            Operand("write_indices", "int64", ("B",)),
            *_VISIBILITY[pattern],
        )

    def node(
        self, *, batch: int, step: int, capacity: int, kv_heads: int, group: int, head_dim: int, splits: int
    ) -> Node:
        shapes = {
            "q": (batch, kv_heads * group, step, head_dim),
            **dict.fromkeys(("k_cache", "v_cache"), (batch, kv_heads, capacity, head_dim)),
            "write_indices": (batch,),
            "step_lengths": (batch,),
            "block_mask": (batch, step, step),
        }
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs}, {"splits": splits})

    def constants(self, node: Node) -> Constants:
        (_, heads, _, head_dim), kv_heads = node.fixed["q"], node.fixed["k_cache"][1]
        return {"KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "HEAD_DIM": head_dim}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def default_tactic(self, node: Node, emitted: Collection[int]) -> int:
        """128 queries if they hold those of a sequence, else 64. On an H100, 128 are up to 15 % faster in batches of
        drafts, and 64 up to 10 % in batches with a mask; with one sequence, the two differ by at most 5 %. The tile of
        16 queries is faster only for few queries and rows, and may round differently, so a GPU that has another one
        does not use it.
        """
        batch, _, step, _ = node.shapes["q"]
        queries = step * self.constants(node)["GROUP"]
        wanted = 2 if 64 < queries <= 128 and (batch == 1 or self.pattern == "bidirectional") else 1
        return wanted if wanted in emitted else min(emitted)

    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each tile of the queries of one key-value head, split and sequence."""
        batch, _, step, _ = node.shapes["q"]
        constants = self.constants(node)
        tiles = ceil_div(step * constants["GROUP"], tactic.constants["BLOCK_M"])
        return tiles, split_count(node.attributes["splits"], step) * constants["KV_HEADS"], batch

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        return node.shapes["q"][2], node.shapes["k_cache"][2]

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        batch, heads, step, head_dim = node.shapes["q"]
        splits = split_count(node.attributes["splits"], step)
        return [(batch, splits, heads, step, head_dim), (batch, splits, heads, step)]


class MergeSplits(Operator):
    """The splits' results, weighted by their log-sum-exps. Attributes: :class:`Attend`'s ``splits``; ``group``, the
    query heads of a key-value head.

    With ``output_scale``, the merged result is multiplied by it: by AWQ's input scale of the matrix that reads it. The
    product is rounded once.
    """

    kernel = "attention.merge_kernel"
    scalars = ("step", "splits")
    outputs = (ATTENDED,)
    attributes = ("splits", "group")

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({}, warps=2, stages=1), Tactic({}, warps=4, stages=1))

    def __init__(self, *, output_scale: bool = False) -> None:
        self.name = f"MergeSplits{'Scaled' if output_scale else ''}"
        self.inputs = (_PARTIAL, _LOG_SUM_EXP, *((_OUTPUT_SCALE,) if output_scale else ()))

    def node(self, *, batch: int, step: int, kv_heads: int, group: int, head_dim: int, splits: int) -> Node:
        rows = (batch, split_count(splits, step), kv_heads * group, step)
        shapes = {
            "partial": (*rows, head_dim),
            "log_sum_exp": rows,
            "output_scale": (kv_heads * group * head_dim,),
        }
        attributes = {"splits": splits, "group": group}
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs}, attributes)

    def constants(self, node: Node) -> Constants:
        """SPLITS: the next power of two."""
        (_, _, heads, _, head_dim), group = node.fixed["partial"], node.attributes["group"]
        splits = 1 << (node.attributes["splits"] - 1).bit_length()
        return {"KV_HEADS": heads // group, "GROUP": group, "HEAD_DIM": head_dim, "SPLITS": splits}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, _tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each token and key-value head."""
        batch, _, _, step, _ = node.shapes["partial"]
        return step, self.constants(node)["KV_HEADS"], batch

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        return node.shapes["partial"][3], node.shapes["partial"][1]

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        batch, _, heads, step, head_dim = node.shapes["partial"]
        return [(batch, step, heads * head_dim)]


def split_count(splits: int, step: Dim) -> Dim:
    """P, the number of splits that a step of ``step`` tokens is launched with: ``splits`` / ceil(step / SPLIT_STEP),
    rounded up.
    """
    chunks = ceil_div(step, SPLIT_STEP)
    return (chunks + (splits - 1)) // chunks
