"""Masked attention over the KV pool: split over its rows, then merged.

The queries that share a key-value head form the rows of one tile, so K and V are never replicated. Tiles of KV rows
begin at fixed rows of a sequence and are dealt to the splits in turn; each split attends to its own tiles in order, and
:func:`merge_kernel` weights the results by their log-sum-exps. So neither the sequence's length nor the step's changes
the order in which a query's logits are summed: a token gets the same bits alone, in a block and in a batch. The number
of launched splits depends on shapes only. The step's own rows are read from the pool, where
:mod:`trimode.plugins.kernels.kv_write` has stored them: a second source would double the inner loop.

The queries come multiplied by the softmax's scale. Logits, softmax and sums are fp32. Merged results are multiplied by
``output_scale``, if there is one, before they are rounded.

With a paged pool only the address of a tile of rows would change: for pages of a multiple of BLOCK_N rows, one load
from the page table for each tile; for smaller pages, one for each row.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_kernel(
    q,
    k_cache,
    v_cache,
    write_indices,
    step_lengths,
    block_mask,
    step,
    capacity,
    partial,
    log_sum_exp,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program computes BLOCK_M rows of one key-value head's queries for one split of one sequence.

    With ``step_lengths`` the pattern is bidirectional, with ``block_mask`` masked, with neither causal. BLOCK_N: KV
    rows of a tile. Results have the same bits only for the same BLOCK_N.
    """
    splits = tl.num_programs(1) // KV_HEADS
    # Neighbouring programs read the same data: tiles the same KV rows, splits of a head the same queries.
    split, head, batch = tl.program_id(1) % splits, tl.program_id(1) // splits, tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < GROUP * step
    # row % step. A division of integers takes many more instructions.
    token = row
    for member in tl.static_range(1, GROUP):
        token -= tl.where(row >= member * step, step, 0)
    # No token of the tile attends to rows from `length` on. Every token attends to all rows before `plain`.
    committed = tl.load(write_indices + batch).to(tl.int32)
    if step_lengths is not None:
        length = committed + tl.load(step_lengths + batch).to(tl.int32)
        plain = length
    elif block_mask is not None:
        length = committed + step
        plain = committed
    else:
        length = committed + tl.max(tl.where(exists, token, 0), 0) + 1
        plain = committed + tl.min(tl.where(exists, token, step), 0) + 1
    length = tl.minimum(length, capacity)

    tiles, whole = tl.cdiv(length, BLOCK_N), tl.minimum(plain, length) // BLOCK_N
    result = ((batch * splits + split) * KV_HEADS + head) * GROUP * step + row
    if split >= tiles:
        tl.store(log_sum_exp + result, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=exists)
        return

    column = tl.arange(0, HEAD_DIM)
    in_q = q + ((batch * KV_HEADS + head) * GROUP * step + row[:, None]) * HEAD_DIM + column[None, :]
    query = tl.load(in_q, mask=exists[:, None], other=0.0)
    in_cache = (batch * KV_HEADS + head) * capacity * HEAD_DIM + column[None, :]
    keys, values = k_cache + in_cache, v_cache + in_cache
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for tile in tl.range(split, whole, splits):
        at = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        key = tl.load(keys + at * HEAD_DIM)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
        value = tl.load(values + at * HEAD_DIM)
        best, total, sums = _accumulate(logits, value, best, total, sums)
    # Tiles with rows that some query does not attend to: at most a few, so that one is prefetched.
    first = split + tl.cdiv(tl.maximum(whole - split, 0), splits) * splits
    in_tile = tl.arange(0, BLOCK_N)
    if block_mask is not None:
        tl.static_assert(BLOCK_N <= 32, "a word has a bit for each KV row of a tile")
        mask, in_mask = block_mask + batch * step * step, tl.where(exists, token * step, -1)
    for tile in tl.range(first, tiles, splits, num_stages=2):
        at = tile * BLOCK_N + in_tile
        inside = at < length
        other = at - committed  # token of the step; negative for committed rows
        if block_mask is not None:
            # As the bits of one word for each query. If logits were compared with the bytes, the compiler would compute
            # the softmax in the layout of their load: with more barriers and registers, and sums in another order.
            named = (in_mask >= 0)[:, None] & ((other >= 0) & inside)[None, :]
            allowed = tl.load(mask + (in_mask[:, None] + other[None, :]), mask=named, other=0) != 0
            allowed = allowed | ((other < 0) & inside)[None, :]
            words = tl.sum(allowed.to(tl.int32) << in_tile[None, :], 1)
        key = tl.load(keys + at[:, None] * HEAD_DIM, mask=inside[:, None], other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
        if block_mask is not None:
            seen = ((words[:, None] >> in_tile[None, :]) & 1) != 0
        elif step_lengths is not None:
            seen = inside[None, :]
        else:
            seen = inside[None, :] & (other[None, :] <= token[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        value = tl.load(values + at[:, None] * HEAD_DIM, mask=inside[:, None], other=0.0)
        best, total, sums = _accumulate(logits, value, best, total, sums)

    saw = total > 0
    total = tl.where(saw, total, 1.0)
    tl.store(log_sum_exp + result, tl.where(saw, best + tl.log2(total) / LOG2_E, float("-inf")), mask=exists)
    sums = sums / total[:, None]
    target = partial + result[:, None] * HEAD_DIM + column[None, :]
    tl.store(target, sums.to(partial.dtype.element_ty), mask=(exists & saw)[:, None])


@triton.jit
def _accumulate(logits, value, best, total, sums):
    """Update the online softmax with one tile. A query that has attended to no row yet keeps -inf, 0 and 0.

    Multiplications and additions are fused explicitly. If the compiler chose, tiles with masks and tiles without could
    round differently. A tile without an attended row changes no bit: its weights are 0, and ``fade`` is exactly 1.
    """
    higher = tl.maximum(best, tl.max(logits, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(tl.fma(logits, LOG2_E, (finite * -LOG2_E)[:, None]))
    # As one fused operation, the rounding of the shift would remain, where ``best`` stays: then 1 + 1e-7, not 1.
    fade = tl.exp2((best - finite) * LOG2_E)
    total = tl.fma(total, fade, tl.sum(weights, 1))
    sums = tl.dot(weights.to(value.dtype), value, sums * fade[:, None], input_precision="ieee")
    return higher, total, sums


@triton.jit
def merge_kernel(
    partial,
    log_sum_exp,
    output_scale,
    step,
    splits,
    attended,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A program merges one token's queries of one key-value head. SPLITS: a power of two, at least ``splits``."""
    token, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    member = tl.arange(0, triton.next_power_of_2(GROUP))
    head = group * GROUP + member
    split = tl.arange(0, SPLITS)[:, None]
    row = ((batch * splits + split) * (KV_HEADS * GROUP) + head[None, :]) * step + token
    exists = (split < splits) & (member < GROUP)[None, :]
    weight = tl.load(log_sum_exp + row, mask=exists, other=float("-inf"))
    saw = weight > float("-inf")
    best = tl.max(weight, 0)
    weight = tl.exp(weight - tl.where(best == float("-inf"), 0.0, best)[None, :])
    total = tl.sum(weight, 0)
    column = tl.arange(0, HEAD_DIM)
    at = partial + row[:, :, None] * HEAD_DIM + column[None, None, :]
    parts = tl.load(at, mask=saw[:, :, None], other=0.0).to(tl.float32)
    merged = tl.sum(parts * weight[:, :, None], 0) / tl.where(total > 0, total, 1.0)[:, None]
    in_token, inside = head[:, None] * HEAD_DIM + column[None, :], (member < GROUP)[:, None]
    if output_scale is not None:
        merged *= tl.load(output_scale + in_token, mask=inside, other=0.0)
    target = attended + (batch * step + token) * (KV_HEADS * GROUP) * HEAD_DIM + in_token
    tl.store(target, merged.to(attended.dtype.element_ty), mask=inside)
