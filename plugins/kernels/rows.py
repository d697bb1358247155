"""Copies of rows named by indices: the embedding of tokens, and the rows of a step that need logits."""

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
    source = table + tl.load(input_ids + token) * WIDTH
    _copy(source, embedded + token * WIDTH, WIDTH, BLOCK)
    if next_weight is not None:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(source + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        row = tl.program_id(0) + tl.arange(0, 1)
        write_norm_terms(x[:, None], next_weight, weighted, next_squares, column, row, tokens, WIDTH)


@triton.jit
def select_rows_kernel(
    x,
    logit_rows,
    step,
    selected_rows,
    selected,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program copies BLOCK columns of one selected row."""
    row = tl.program_id(0).to(tl.int64)
    source = row // selected_rows * step + tl.load(logit_rows + row)
    _copy(x + source * WIDTH, selected + row * WIDTH, WIDTH, BLOCK)


@triton.jit
def _copy(source, target, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + column, tl.load(source + column, mask=column < WIDTH), mask=column < WIDTH)
