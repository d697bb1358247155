"""The operators of the 8B checkpoint's graphs and their sizes.

Plain integers: a GPU host without pydantic imports this module. A test compares them with the audit's configuration.
"""

from __future__ import annotations

from typing import NamedTuple

from trimode.plugins.operators import Int4Product, Node, QkvProduct

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 34, 4096, 14336, 131072
# Keyword arguments of the attention operators' nodes.
ATTENTION = {"kv_heads": 8, "group": 4, "head_dim": 128}
QUERY_WIDTH = ATTENTION["kv_heads"] * ATTENTION["group"] * ATTENTION["head_dim"]
KV_WIDTH = ATTENTION["kv_heads"] * ATTENTION["head_dim"]
SPLITS = 16
ADAPTER_RANK = 128


class Product(NamedTuple):
    """A product x [rows, inner] W [inner, columns] in groups of 128. rank: of the adapter, 0 without one."""

    operator: Int4Product
    inner: int
    columns: int
    rank: int = 0

    def node(self, rows: int) -> Node:
        return self.operator.node(rows=rows, inner=self.inner, columns=self.columns, rank=self.rank)


QKV = QkvProduct(split=True, normed=True)


def qkv_node(step: int, capacity: int) -> Node:
    """Of one sequence."""
    return QKV.qkv_node(batch=1, step=step, capacity=capacity, inner=HIDDEN, **ATTENTION)


PRODUCTS = {
    "qkv": Product(Int4Product(split=True), HIDDEN, QUERY_WIDTH + 2 * KV_WIDTH),
    "o": Product(Int4Product(split=True, residual=True, for_norm=True), QUERY_WIDTH, HIDDEN),
    "o with adapter": Product(
        Int4Product(split=True, adapter=True, residual=True, for_norm=True),
        QUERY_WIDTH,
        HIDDEN,
        ADAPTER_RANK,
    ),
    "gate_up": Product(Int4Product(normed=True, gated=True), HIDDEN, 2 * INTERMEDIATE),
    "down": Product(Int4Product(split=True, residual=True, for_norm=True), INTERMEDIATE, HIDDEN),
}
