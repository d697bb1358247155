"""The operators of the ``trimode`` domain: one class each, and every operator of a graph by its name.

Nothing here imports torch, Triton or TensorRT: the runtime computes shapes, tactics, grids and scalars from integers.
"""

from __future__ import annotations

from itertools import product
from typing import get_args

from trimode.plugins.operators.attention import Attend, MergeSplits, Pattern
from trimode.plugins.operators.int4_product import Int4Product
from trimode.plugins.operators.kv_write import KvWrite
from trimode.plugins.operators.operator import DOMAIN, Constants, Dim, Node, Operand, Operator, Shapes, Tactic

__all__ = [
    "DOMAIN",
    "OPERATORS",
    "Attend",
    "Constants",
    "Dim",
    "Int4Product",
    "KvWrite",
    "MergeSplits",
    "Node",
    "Operand",
    "Operator",
    "Pattern",
    "Shapes",
    "Tactic",
]

_ALL: tuple[Operator, ...] = (
    KvWrite(),
    *(Attend(pattern) for pattern in get_args(Pattern)),
    MergeSplits(),
    *(
        Int4Product(input_scale=input_scale, adapter=adapter, residual=residual)
        for input_scale, adapter, residual in product((False, True), repeat=3)
    ),
)
OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _ALL}
