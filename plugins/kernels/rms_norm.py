"""Root mean square normalisation of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, weight, epsilon, normed, WIDTH: tl.constexpr):
    """A program normalises one row, which it holds in registers."""
    column = tl.arange(0, triton.next_power_of_2(WIDTH))
    exists = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    row = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    mean = tl.sum(row * row, 0) / WIDTH
    element = normed.dtype.element_ty
    unit = (row * (1 / tl.sqrt_rn(mean + tl.load(epsilon)))).to(element)
    scale = tl.load(weight + column, mask=exists, other=0.0)
    tl.store(normed + at, (unit.to(tl.float32) * scale.to(tl.float32)).to(element), mask=exists)
