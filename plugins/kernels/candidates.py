"""The best candidates of each row of logits, their log-sum-exp, and the logits of asked tokens.

A candidate is one 64-bit key: the bits of its logit, as an integer of the same order, above those of its token,
inverted. The largest key is then the highest logit, and of equal ones the lowest token. The k best are k maxima, each
removed once it is found: for one candidate a single reduction, for 64 about a thousand instructions a warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.kernels.dependent_launch import wait_for_previous
from trimode.plugins.operators import candidates

TILE = tl.constexpr(candidates.TILE)
NEVER = tl.constexpr(candidates.NEVER)
LAST_TOKEN = tl.constexpr(2**31 - 1)
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def top_candidates_kernel(
    logits,
    token_mask,
    tile_logits,
    tile_tokens,
    tile_sums,
    VOCABULARY: tl.constexpr,
    TOP_K: tl.constexpr,
    MASK_TOKEN: tl.constexpr,
    CAPABILITY: tl.constexpr,
):
    """A program handles one tile of one row, as 32 tokens, a word of the mask, in a row of its registers."""
    wait_for_previous(CAPABILITY)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    word = tile * (TILE // 32) + tl.arange(0, TILE // 32)[:, None]
    bit = tl.arange(0, 32)[None, :]
    token = word * 32 + bit
    exists = token < VOCABULARY
    legal = exists & (token != MASK_TOKEN)
    if token_mask is not None:
        WORDS: tl.constexpr = (VOCABULARY + 31) // 32
        words = tl.load(token_mask + row * WORDS + word, mask=word < WORDS, other=0)
        legal = legal & (((words >> bit) & 1) != 0)
    # Illegal tokens are loaded as well: a load of 16 bytes has one mask.
    logit = tl.load(logits + row * VOCABULARY + token, mask=exists, other=0.0).to(tl.float32)
    logit = tl.where(legal, logit, NEVER)
    best = tl.max(logit)
    result = row * tl.num_programs(0) + tile
    # Without a legal token, the sum is NEVER + log(TILE), which is NEVER in fp32.
    tl.store(tile_sums + result, best + tl.log(tl.sum(tl.exp(logit - best))))
    keys = _keys(logit, token)
    for place in tl.range(0, TOP_K):
        best_logit, best_token, keys = _take_best(keys)
        tl.store(tile_logits + result * TOP_K + place, best_logit)
        tl.store(tile_tokens + result * TOP_K + place, best_token)


@triton.jit
def merge_candidates_kernel(
    tile_logits,
    tile_tokens,
    tile_sums,
    top_logits,
    top_tokens,
    log_sum_exp,
    TILES: tl.constexpr,
    TOP_K: tl.constexpr,
    CAPABILITY: tl.constexpr,
):
    """A program handles one row."""
    wait_for_previous(CAPABILITY)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, triton.next_power_of_2(TILES))
    sums = tl.load(tile_sums + row * TILES + tile, mask=tile < TILES, other=float("-inf"))
    best = tl.max(sums)
    tl.store(log_sum_exp + row, best + tl.log(tl.sum(tl.exp(sums - best))))
    CANDIDATES: tl.constexpr = TILES * TOP_K
    candidate = tl.arange(0, triton.next_power_of_2(CANDIDATES))
    exists = candidate < CANDIDATES
    at = row * CANDIDATES + candidate
    keys = _keys(tl.load(tile_logits + at, mask=exists, other=0.0), tl.load(tile_tokens + at, mask=exists, other=0))
    keys = tl.where(exists, keys, LOWEST)
    for place in tl.range(0, TOP_K):
        best_logit, best_token, keys = _take_best(keys)
        tl.store(top_logits + row * TOP_K + place, best_logit)
        tl.store(top_tokens + row * TOP_K + place, best_token.to(tl.int64))


@triton.jit
def _keys(logit, token):
    """logit: fp32. token: int32."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 equals 0
    return (_ordered(bits).to(tl.int64) << 32) | (token ^ LAST_TOKEN).to(tl.int64)


@triton.jit
def _ordered(bits):
    """From the bits of a float to an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _take_best(keys):
    """The logit and the token of the largest key, and the keys without it."""
    best = tl.max(keys)
    logit = _ordered((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    token = (best & LAST_TOKEN).to(tl.int32) ^ LAST_TOKEN
    return logit, token, tl.where(keys == best, LOWEST, keys)


@triton.jit
def asked_logits_kernel(
    logits,
    asked_ids,
    rows,
    asked,
    asked_logits,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPABILITY: tl.constexpr,
):
    """A program handles BLOCK ids of all rows together."""
    wait_for_previous(CAPABILITY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < rows.to(tl.int64) * asked
    token = tl.load(asked_ids + at, mask=exists, other=0)
    logit = tl.load(logits + at // asked * VOCABULARY + token, mask=exists, other=0.0)
    tl.store(asked_logits + at, logit.to(tl.float32), mask=exists)
