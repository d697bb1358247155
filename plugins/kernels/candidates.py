"""The best candidates of each row, from the tiles that a head writes (:mod:`trimode.plugins.kernels.head_product`).

A candidate is one 64-bit key: the bits of its logit, as an integer of the same order, above those of its token,
inverted. The largest key is then the highest logit, and of equal ones the lowest token.

Each tile offers its best token. The largest of these keys is the best token of the row; in its place, its tile then
offers the largest key below it. No two keys are equal, so no token is taken twice or left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.operators import candidates

TILE = tl.constexpr(candidates.TILE)
LAST_TOKEN = tl.constexpr(2**31 - 1)
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def merge_candidates_kernel(
    tile_logits,
    tile_tokens,
    tile_sums,
    logits,
    top_logits,
    top_tokens,
    log_sum_exp,
    TILES: tl.constexpr,
    VOCABULARY: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """A program handles one row."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, triton.next_power_of_2(TILES))
    exists = tile < TILES
    at = row * TILES + tile
    sums = tl.load(tile_sums + at, mask=exists, other=float("-inf"))
    highest = tl.max(sums)
    tl.store(log_sum_exp + row, highest + tl.log(tl.sum(tl.exp(sums - highest))))
    offered = _keys(tl.load(tile_logits + at, mask=exists, other=0.0), tl.load(tile_tokens + at, mask=exists, other=0))
    offered = tl.where(exists, offered, LOWEST)
    for place in tl.range(0, TOP_K):
        best = tl.max(offered)
        token = (best & LAST_TOKEN).to(tl.int32) ^ LAST_TOKEN
        tl.store(top_logits + row * TOP_K + place, _ordered((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True))
        tl.store(top_tokens + row * TOP_K + place, token.to(tl.int64))
        if TOP_K > 1:
            tokens = token // TILE * TILE + tl.arange(0, TILE)
            inside = tokens < VOCABULARY
            others = _keys(tl.load(logits + row * VOCABULARY + tokens, mask=inside, other=0.0), tokens)
            next_best = tl.max(tl.where(inside & (others < best), others, LOWEST))
            offered = tl.where(tile == token // TILE, next_best, offered)


@triton.jit
def _keys(logit, token):
    """logit: fp32. token: int32."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 equals 0
    return (_ordered(bits).to(tl.int64) << 32) | (token ^ LAST_TOKEN).to(tl.int64)


@triton.jit
def _ordered(bits):
    """From the bits of a float to an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
