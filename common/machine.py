"""The processor properties that a CPU engine depends on."""

from __future__ import annotations

import platform
from pathlib import Path

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
