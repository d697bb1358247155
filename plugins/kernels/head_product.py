"""The product with the head, and what follows the logits, while they are in registers.

For each row and tile of TILE tokens, a program writes the best legal token, its logit, and the log-sum-exp of the legal
ones. A row's logits take two bytes a token in the type of the activations; its tiles take less than a fifth of one.
For several candidates of a row, the logits themselves are written as well: the tiles with the row's best tokens hold
its candidates, and which ones these are is known only when all programs have ended.

Exponentials are summed as multiples of 2^-23, in integers, so that the sum's bits do not depend on the order in which
threads add. The largest exponential of a tile is 1.

W^T is the tensor cores' first operand and x^T the second one, as in :mod:`trimode.plugins.kernels.int4_product`, for
weights that are not int4 too: then all tile sizes sum in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.kernels.int4_product import product_sum
from trimode.plugins.kernels.norm_terms import one_over_rms
from trimode.plugins.operators import candidates

TILE = tl.constexpr(candidates.TILE)
NEVER = tl.constexpr(candidates.NEVER)
LAST_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def int4_head_kernel(
    x,
    packed,
    scale,
    squares,
    epsilon,
    token_mask,
    asked_ids,
    rows,
    asked,
    tile_logits,
    tile_tokens,
    tile_sums,
    logits,
    asked_logits,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    MASK_TOKEN: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPABILITY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """LISTED: whether logits are written. CAPABILITY: compute capability, 90 for 9.0; None in the interpreter."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if squares is not None:
        norm = one_over_rms(squares, epsilon, row, rows, INNER)
    _, result = product_sum(
        x, packed, scale, None, None, row, rows, column,
        INNER, COLUMNS, GROUP, UNIT, 1, BLOCK_M, BLOCK_N, False, CAPABILITY, STAGES,
    )  # fmt: skip
    if squares is not None:
        result *= norm[None, :]
    _write_results(
        result, column, row, rows, token_mask, asked_ids, asked,
        tile_logits, tile_tokens, tile_sums, logits, asked_logits, COLUMNS, MASK_TOKEN, LISTED,
    )  # fmt: skip


@triton.jit
def dense_head_kernel(
    x,
    weight,
    token_mask,
    asked_ids,
    rows,
    asked,
    tile_logits,
    tile_tokens,
    tile_sums,
    logits,
    asked_logits,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK_TOKEN: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As the kernel above."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists, inside = (row < rows)[None, :], (column < COLUMNS)[:, None]
    inner = tl.arange(0, BLOCK_K)
    in_x = x + row[None, :].to(tl.int64) * INNER + inner[:, None]
    in_weight = weight + inner[None, :].to(tl.int64) * COLUMNS + column[:, None]
    result = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in tl.range(0, INNER, BLOCK_K, num_stages=STAGES):
        weights_here = in_weight + tl.cast(first, tl.int64) * COLUMNS
        if INNER % BLOCK_K == 0 and COLUMNS % BLOCK_N == 0:
            weights = tl.load(weights_here)
            tokens = tl.load(in_x + first, mask=exists, other=0.0)
        else:
            remaining = inner < INNER - first
            weights = tl.load(weights_here, mask=inside & remaining[None, :], other=0.0)
            tokens = tl.load(in_x + first, mask=exists & remaining[:, None], other=0.0)
        result = tl.dot(weights, tokens, result, input_precision="ieee")
    _write_results(
        result, column, row, rows, token_mask, asked_ids, asked,
        tile_logits, tile_tokens, tile_sums, logits, asked_logits, COLUMNS, MASK_TOKEN, LISTED,
    )  # fmt: skip


@triton.jit
def _write_results(
    result,
    column,
    row,
    rows,
    token_mask,
    asked_ids,
    asked,
    tile_logits,
    tile_tokens,
    tile_sums,
    logits,
    asked_logits,
    COLUMNS: tl.constexpr,
    MASK_TOKEN: tl.constexpr,
    LISTED: tl.constexpr,
):
    """result: logits of the tokens ``column``, [columns, rows]."""
    BLOCK_N: tl.constexpr = result.shape[0]
    exists = (row < rows)[None, :]
    here = (column < COLUMNS)[:, None] & exists
    wide = row.to(tl.int64)
    for index in tl.range(0, asked):
        at = wide * asked + index
        wanted = tl.load(asked_ids + at, mask=row < rows, other=-1).to(tl.int32)
        # Few programs have an asked token.
        if tl.max((wanted // BLOCK_N == tl.program_id(1)).to(tl.int32), 0) > 0:
            found = exists & (column[:, None] == wanted[None, :])
            tl.store(asked_logits + at[None, :] + 0 * column[:, None], result, mask=found)
    legal = here & (column != MASK_TOKEN)[:, None]
    if token_mask is not None:
        WORDS: tl.constexpr = (COLUMNS + 31) // 32
        words = tl.load(token_mask + wide[None, :] * WORDS + (column // 32)[:, None], mask=here, other=0)
        legal = legal & (((words >> (column % 32)[:, None]) & 1) != 0)
    result = tl.where(legal, result, NEVER)
    if LISTED:
        tl.store(logits + wide[None, :] * COLUMNS + column[:, None], result, mask=here)

    TILES: tl.constexpr = BLOCK_N // TILE
    tiles = tl.reshape(result, [TILES, TILE, result.shape[1]])
    best = tl.max(tiles, 1)
    token = tl.reshape(tl.broadcast_to(column[:, None], result.shape), tiles.shape)
    # Tokens behind the last one have the highest ids, so they are never the lowest of equal ones.
    best_token = tl.min(tl.where(tiles == best[:, None, :], token, LAST_TOKEN), 1)
    # Without a legal token, the sum is NEVER + log(TILE), which is NEVER in fp32.
    exponentials = tl.exp(tiles - best[:, None, :])
    total = tl.sum((exponentials * 8388608.0 + 0.5).to(tl.int32), 1).to(tl.float32) / 8388608.0
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    at = wide[None, :] * ((COLUMNS + TILE - 1) // TILE) + tile[:, None]
    written = (tile * TILE < COLUMNS)[:, None] & exists
    tl.store(tile_logits + at, best, mask=written)
    tl.store(tile_tokens + at, best_token, mask=written)
    tl.store(tile_sums + at, best + tl.log(total), mask=written)
