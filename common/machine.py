"""What this machine gives a CPU engine: instruction set, CPUs and memory."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import psutil

from trimode.common.cgroup import cpu_quota, memory_left

# ONNX Runtime's kernels choose their weight layouts by these extensions.
_EXTENSIONS = {
    *("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx_vnni"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme", "sme2"),
}


def instruction_set() -> str:
    """Architecture and vector extensions, e.g. ``x86_64: avx avx2 fma``."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags: set[str] = set()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return f"{platform.machine()}: {' '.join(sorted(flags & _EXTENSIONS))}".strip()


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and its cgroup's quota rounded up."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def available_memory() -> int:
    """Bytes that this process can still allocate: the machine's available memory, and its cgroup's limit."""
    machine = int(psutil.virtual_memory().available)
    group = memory_left()
    return machine if group is None else min(machine, group)
