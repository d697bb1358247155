"""The operators of the ``trimode`` domain: one class each, and every operator of a graph by its name.

Nothing here imports torch, Triton or TensorRT: the runtime computes shapes, tactics, grids and scalars from integers.
"""

from __future__ import annotations

from itertools import product
from typing import get_args

from trimode.plugins.operators.all_reduce import AllReduce
from trimode.plugins.operators.attention import Attend, MergeSplits, Pattern
from trimode.plugins.operators.candidates import MergeCandidates
from trimode.plugins.operators.dense_product import DenseProduct
from trimode.plugins.operators.embed import Embed
from trimode.plugins.operators.head_product import DenseHead, Head, Int4Head
from trimode.plugins.operators.int4_product import Int4Product
from trimode.plugins.operators.kv_write import KvWrite
from trimode.plugins.operators.operator import DOMAIN, Constants, Dim, Node, Operand, Operator, Shapes, Tactic
from trimode.plugins.operators.qkv_product import QkvProduct
from trimode.plugins.operators.rms_norm import RmsNorm
from trimode.plugins.operators.rotations import Rotations
from trimode.plugins.operators.select_rows import SelectRows
from trimode.plugins.operators.swiglu import SwiGlu

__all__ = [
    "DOMAIN",
    "OPERATORS",
    "PLUGINS",
    "AllReduce",
    "Attend",
    "Constants",
    "DenseHead",
    "DenseProduct",
    "Dim",
    "Embed",
    "Head",
    "Int4Head",
    "Int4Product",
    "KvWrite",
    "MergeCandidates",
    "MergeSplits",
    "Node",
    "Operand",
    "Operator",
    "Pattern",
    "QkvProduct",
    "RmsNorm",
    "Rotations",
    "SelectRows",
    "Shapes",
    "SwiGlu",
    "Tactic",
]

_ALL: tuple[Operator, ...] = (
    KvWrite(),
    *(Attend(pattern) for pattern in get_args(Pattern)),
    *(MergeSplits(output_scale=output_scale) for output_scale in (False, True)),
    *(
        Int4Product(split=split, adapter=adapter, residual=residual)
        for split, adapter, residual in product((False, True), repeat=3)
    ),
    *(
        Int4Product(split=split, adapter=adapter, residual=True, for_norm=True)
        for split, adapter in product((False, True), repeat=2)
    ),
    *(Int4Product(split=split, normed=True) for split in (False, True)),
    *(Int4Product(split=split, normed=normed, gated=True) for split, normed in product((False, True), repeat=2)),
    *(QkvProduct(split=split, normed=normed) for split, normed in product((False, True), repeat=2)),
    Embed(),
    Embed(for_norm=True),
    Rotations(),
    RmsNorm(),
    SwiGlu(),
    DenseProduct(),
    DenseProduct(row_scale=True),
    DenseProduct(split=True, row_scale=True),
    DenseProduct(residual=True),
    DenseProduct(adapter=True),
    DenseProduct(adapter=True, residual=True),
    SelectRows(),
    AllReduce(),
    AllReduce(for_norm=True),
    *(Int4Head(normed=normed, masked=masked) for normed, masked in product((False, True), repeat=2)),
    DenseHead(),
    DenseHead(masked=True),
    MergeCandidates(),
)
OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _ALL}
# Those that are TensorRT plugins as well: all but the sums of ranks, which read memory that TensorRT does not know.
PLUGINS = {name: operator for name, operator in OPERATORS.items() if not isinstance(operator, AllReduce)}
