"""The instructions of a compiled kernel's main loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from trimode.plugins.compilation import CompiledKernel

_WARP = 32


def disassembled(kernel: CompiledKernel) -> str:
    """nvdisasm's listing of the kernel's binary."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.cubin)
        nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        return subprocess.run([nvdisasm, "-c", binary], check=True, capture_output=True, text=True).stdout


def main_loop(listing: str) -> list[str]:
    """The instructions of the longest loop that contains no other one and multiplies on tensor cores, in nvdisasm's
    listing of a kernel.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            branch = re.search(r"BRA.*\((\.L_x_\d+)\)", instruction[1])
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(instructions)))
    innermost = [
        instructions[start:end]
        for start, end in loops
        if not any(start <= inner and last <= end and (inner, last) != (start, end) for inner, last in loops)
    ]
    return max((loop for loop in innermost if any("MMA" in line for line in loop)), key=len)


def blocking_loads(loop: list[str]) -> list[str]:
    """Loads from device memory for which the loop waits: all but cp.async."""
    return [line for line in loop if re.search(r"\bLDG\b", line)]


def instructions_per_weight(loop: list[str], warps: int, weights: int) -> float:
    """Instructions of all threads of so many warps in an iteration of the loop, which unpacks so many weights."""
    return len(loop) * warps * _WARP / weights
