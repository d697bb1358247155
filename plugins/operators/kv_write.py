"""The step's queries, keys and values: rotated, and keys and values written into the KV pool."""

from __future__ import annotations

from typing import ClassVar

from trimode.plugins.operators.operator import Constants, Dim, Node, Operand, Operator, Tactic, numbered

ROTATION = ("B", "S", "D / 2")
CACHE = ("B", "HKV", "C", "D")


class KvWrite(Operator):
    """Rotates queries and keys; writes keys and values to rows ``write_indices`` .. + S of the pool, in place.

    cos, sin: YaRN's tables. The queries' tables include the position's scale and the softmax's.
    """

    name = "KvWrite"
    kernel = "kv_write.kv_write_kernel"
    inputs = (
        Operand("qkv", "real", ("B", "S", "(HQ + 2 HKV) D")),
        Operand("query_cos", "real", ROTATION),
        Operand("query_sin", "real", ROTATION),
        Operand("key_cos", "real", ROTATION),
        Operand("key_sin", "real", ROTATION),
        Operand("write_indices", "int64", ("B",)),
        Operand("k_cache", "real", CACHE),
        Operand("v_cache", "real", CACHE),
    )
    scalars = ("step", "capacity")
    outputs = (
        Operand("q", "real", ("B", "HQ", "S", "D")),
        Operand("k_cache_out", "real", CACHE, aliases="k_cache"),
        Operand("v_cache_out", "real", CACHE, aliases="v_cache"),
    )

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({}, warps=4, stages=1), Tactic({}, warps=8, stages=1))

    @staticmethod
    def node(*, batch: int, step: int, capacity: int, kv_heads: int, group: int, head_dim: int) -> Node:
        rotation, cache = (batch, step, head_dim // 2), (batch, kv_heads, capacity, head_dim)
        return Node.of(
            {
                "qkv": (batch, step, (group + 2) * kv_heads * head_dim),
                **dict.fromkeys(("query_cos", "query_sin", "key_cos", "key_sin"), rotation),
                "write_indices": (batch,),
                **dict.fromkeys(("k_cache", "v_cache"), cache),
            }
        )

    def constants(self, node: Node) -> Constants:
        _, kv_heads, _, head_dim = node.fixed["k_cache"]
        heads = node.fixed["qkv"][2] // head_dim - 2 * kv_heads
        return {"KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "HEAD_DIM": head_dim}

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, _tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each token."""
        batch, step, _ = node.shapes["qkv"]
        return step, batch, 1

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        return node.shapes["qkv"][1], node.shapes["k_cache"][2]

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        batch, step, width = node.shapes["qkv"]
        cache = tuple(node.shapes["k_cache"])
        return [(batch, width // cache[3] - cache[1] * 2, step, cache[3]), cache, cache]
