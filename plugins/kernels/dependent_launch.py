"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A kernel that is launched so may begin when all programs of the previous kernel have begun. It waits before it reads or
writes anything. (To fetch weights into the L2 cache before the wait made products a quarter slower on an H100.) Every
program of every kernel waits, also one without work: so a kernel that has waited
knows that all kernels before it have ended.

Compute capability 9.0 and later. Without such a launch, waiting takes no time.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
