"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A kernel waits before it reads or writes anything. (To fetch weights into the L2 cache before the wait made products a
quarter slower on an H100.) Every program of every kernel waits, also one without work. So a kernel that has waited
knows that all kernels before it have ended.

A kernel that is launched so is placed on the multiprocessors once every program of the previous kernel has allowed it
or has ended. Programs of large kernels allow it when they have read their last tile. If they allowed it at their start,
the next kernel would be placed while all of them hold registers and shared memory. Its programs would then be
distributed unevenly, and run so.

Compute capability 9.0 and later. Without such a launch, waiting and allowing take no time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(CAPABILITY: tl.constexpr):
    """Wait until all earlier kernels have ended.

    CAPABILITY: compute capability, 90 for 9.0; None in the interpreter.
    """
    if CAPABILITY is not None and CAPABILITY >= 90:
        tl.extra.cuda.gdc_wait()


@triton.jit
def allow_next(CAPABILITY: tl.constexpr):
    """Allow the next kernel to be placed."""
    if CAPABILITY is not None and CAPABILITY >= 90:
        tl.extra.cuda.gdc_launch_dependents()
