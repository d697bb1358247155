"""The rows of a step that need logits."""

from __future__ import annotations

import triton
import triton.language as tl


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
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = row // selected_rows * step + tl.load(logit_rows + row)
    copied = tl.load(x + source * WIDTH + column, mask=column < WIDTH)
    tl.store(selected + row * WIDTH + column, copied, mask=column < WIDTH)
