"""The sum of all ranks' partial sums, read from the memory of their GPUs.

No program waits for a program that may not have begun. The first program of a launch that begins tells all ranks that
this rank's partial sums are complete: the product that wrote them has ended, since it was launched before. Each program
then waits until all ranks have told so. Whichever programs a GPU runs first, the ranks therefore go on.

The numbers of sums grow, so no flag is reset, and a rank may begin the next sum while others complete this one. They
wrap around after 2^32 sums; only differences are compared.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimode.plugins.kernels.norm_terms import write_norm_terms
from trimode.plugins.operators import all_reduce

EPOCH = tl.constexpr(all_reduce.EPOCH)
BEGUN = tl.constexpr(all_reduce.BEGUN)
ENDED = tl.constexpr(all_reduce.ENDED)


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
):
    """A program adds a tile of rows and columns."""
    rank = tl.load(ranks + RANKS)
    own = tl.load(ranks + rank)
    words = own.to(tl.pointer_type(tl.int32))
    number = tl.load(words + EPOCH, volatile=True) + 1
    if tl.atomic_add(words + BEGUN, 1, sem="relaxed", scope="gpu") == 0:
        for peer in tl.static_range(RANKS):
            its_words = tl.load(ranks + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(its_words + rank, number, sem="release", scope="sys")
    for peer in tl.static_range(RANKS):
        while tl.atomic_add(words + peer, 0, sem="acquire", scope="sys") - number < 0:
            pass
    tl.debug_barrier()

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = (column < WIDTH)[:, None] & (row < rows)[None, :]
    at = row[None, :].to(tl.int64) * WIDTH + column[:, None]
    offset = partial.to(tl.int64) - own
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for peer in tl.static_range(RANKS):
        part = (tl.load(ranks + peer) + offset).to(tl.pointer_type(partial.dtype.element_ty))
        part = tl.multiple_of(part, 16)
        # Volatile: from memory, since another GPU has written it.
        total += tl.load(part + at, mask=here, other=0.0, volatile=True).to(tl.float32)
    rounded = (total + tl.load(residual + at, mask=here, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
    tl.store(x + at, rounded, mask=here)
    if next_weight is not None:
        write_norm_terms(rounded.to(tl.float32), next_weight, weighted, next_squares, column, row, rows, WIDTH)

    # The next launch begins after all programs of this one have ended, so it finds the words as they are left here.
    tl.debug_barrier()
    programs = tl.num_programs(0) * tl.num_programs(1)
    if tl.atomic_add(words + ENDED, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(words + BEGUN, 0)
        tl.store(words + ENDED, 0)
        tl.store(words + EPOCH, number)
