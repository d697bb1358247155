"""The int4 product of queries, keys and values, with their rotation and the KV write."""

from __future__ import annotations

from trimode.plugins.operators.int4_product import Int4Product
from trimode.plugins.operators.kv_write import CACHE, ROTATION
from trimode.plugins.operators.operator import Constants, Dim, Node, Operand


class QkvProduct(Int4Product):
    """x W, whose columns are the heads of q, then of k, then of v. Rotates queries and keys; writes
    keys and values to rows ``write_indices`` .. + S of the pool, in place.

    The columns of W are pairs in the order of :data:`trimode.plugins.operators.int4_product.PAIRED`: of each head,
    column i and column i + D / 2. ``normed``: as for :class:`Int4Product`. cos, sin: YaRN's tables. The queries' tables
    include the position's scale and the softmax's.
    """

    kernel = "qkv_product.qkv_product_kernel"
    scalars = ("rows", "step", "capacity")

    def __init__(self, *, split: bool = False, normed: bool = False) -> None:
        super().__init__(split=split, normed=normed)
        self.name = self.name.replace("Int4", "Qkv")
        inputs = {operand.name: operand for operand in self.inputs}
        counters = [inputs.pop("counters")] if split else []
        outputs = {operand.name: operand for operand in self.outputs}
        self.inputs = (
            inputs.pop("x")._replace(shape=("B", "S", "K")),
            *inputs.values(),
            *(Operand(name, "real", ROTATION) for name in ("query_cos", "query_sin", "key_cos", "key_sin")),
            Operand("write_indices", "int64", ("B",)),
            Operand("k_cache", "real", CACHE),
            Operand("v_cache", "real", CACHE),
            *counters,
        )
        self.outputs = (
            Operand("q", "real", ("B", "HQ", "S", "D")),
            *([outputs["partial"]] if split else []),
            Operand("k_cache_out", "real", CACHE, aliases="k_cache"),
            Operand("v_cache_out", "real", CACHE, aliases="v_cache"),
            *([outputs["counters_out"]] if split else []),
        )

    def qkv_node(
        self, *, batch: int, step: int, capacity: int, inner: int, kv_heads: int, group: int, head_dim: int,
        weight_group: int = 128,
    ) -> Node:  # fmt: skip
        """group: query heads of a KV head. weight_group: rows of W that share a scale."""
        columns = (group + 2) * kv_heads * head_dim
        product = self.product_shapes(rows=batch * step, inner=inner, columns=columns, group=weight_group)
        rotation, cache = (batch, step, head_dim // 2), (batch, kv_heads, capacity, head_dim)
        shapes = {
            **product,
            "x": (batch, step, inner),
            **dict.fromkeys(("query_cos", "query_sin", "key_cos", "key_sin"), rotation),
            "write_indices": (batch,),
            **dict.fromkeys(("k_cache", "v_cache"), cache),
        }
        return Node.of({operand.name: shapes[operand.name] for operand in self.inputs})

    def constants(self, node: Node) -> Constants:
        product = super().constants(node)
        _, kv_heads, _, head_dim = node.fixed["k_cache"]
        heads = product["COLUMNS"] // head_dim - 2 * kv_heads
        kept = {name: product[name] for name in ("INNER", "COLUMNS", "GROUP", "UNIT", "SPLITS")}
        return {**kept, "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim}

    def scalar_values(self, node: Node) -> tuple[Dim, ...]:
        return self.rows(node), node.shapes["x"][1], node.shapes["k_cache"][2]

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        _, *sums = super().output_shapes(node)
        (batch, step, _), cache = node.shapes["x"], tuple(node.shapes["k_cache"])
        heads = node.shapes["scale"][1] // cache[3] - cache[1] * 2
        return [(batch, heads, step, cache[3]), *sums[:1], cache, cache, *sums[1:]]
