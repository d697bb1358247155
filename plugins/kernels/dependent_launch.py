"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A kernel that is launched so may begin when all programs of the previous kernel have begun. Until it waits, it may read
constants only, such as weights. Every program of every kernel waits, also one without work: so a kernel that has waited
knows that all kernels before it have ended.

Compute capability 9.0 and later. Without such a launch, waiting takes no time.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LINE: tl.constexpr = tl.constexpr(128)  # bytes


@triton.jit
def wait_for_previous(CAPABILITY: tl.constexpr):
    """Wait until all earlier kernels have ended, and allow the next one to begin.

    CAPABILITY: compute capability, 90 for 9.0; None in the interpreter.
    """
    if CAPABILITY is None:
        pass
    elif CAPABILITY >= 90:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(start, BYTES: tl.constexpr, CAPABILITY: tl.constexpr):
    """Fetch constants into the L2 cache, from the pointer ``start`` on. BYTES: a power of two of lines of 128 bytes."""
    if CAPABILITY is None:
        pass
    elif CAPABILITY >= 90:
        lines = start.to(tl.pointer_type(tl.int8)) + tl.arange(0, BYTES // _LINE) * _LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )
