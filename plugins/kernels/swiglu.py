"""The gated activation of the MLP."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(gate_up, activated, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A program computes BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < WIDTH
    source = gate_up + row * (2 * WIDTH) + column
    gate = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=exists, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(activated + row * WIDTH + column, result.to(activated.dtype.element_ty), mask=exists)
