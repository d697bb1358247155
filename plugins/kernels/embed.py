"""The embedding of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.kernels.norm_terms import write_norm_terms


@triton.jit
def embed_kernel(
    input_ids,
    table,
    next_weight,
    tokens,
    embedded,
    weighted,
    next_squares,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program copies BLOCK columns of one token's row."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = table + tl.load(input_ids + token) * WIDTH
    x = tl.load(source + column, mask=column < WIDTH, other=0.0)
    tl.store(embedded + token * WIDTH + column, x, mask=column < WIDTH)
    if next_weight is not None:
        row = tl.program_id(0) + tl.arange(0, 1)
        write_norm_terms(x.to(tl.float32)[:, None], next_weight, weighted, next_squares, column, row, tokens, WIDTH)
