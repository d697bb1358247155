"""A fault: the sum of ranks without the other ranks' partial sums. It has the parameters of the real kernel."""

# ruff: noqa: ARG001, N803 - the parameters of the real kernel

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.kernels.norm_terms import write_norm_terms


@triton.jit
def all_reduce_kernel(
    partial,
    ranks,
    residual,
    next_weight,
    rows,
    x,
    weighted,
    next_squares,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPABILITY: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = (column < WIDTH)[:, None] & (row < rows)[None, :]
    at = row[None, :].to(tl.int64) * WIDTH + column[:, None]
    sum_ = tl.load(partial + at, mask=here, other=0.0) + tl.load(residual + at, mask=here, other=0.0)
    tl.store(x + at, sum_, mask=here)
    if next_weight is not None:
        write_norm_terms(sum_, next_weight, weighted, next_squares, column, row, rows, WIDTH)
