"""Settings of OpenMP, whose threads torch computes with."""

from __future__ import annotations

import os

from trimode.common.machine import usable_cpus


def configure_openmp() -> None:
    """Let idle OpenMP threads sleep, and use no more threads than this process has CPUs.

    By default, idle threads spin: on a busy machine they take the processor from the thread that they wait for. OpenMP
    respects the affinity of the process, but not its cgroup's CPU quota.

    OpenMP reads these variables when its library is loaded, so call this before the first ``import torch``; later it
    has no effect on this process. Variables that are set already are kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # GNU's OpenMP, which torch brings
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's and Intel's
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))
