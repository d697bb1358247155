"""Resident memory of a process that runs an engine of target ``cpu``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import re, sys
from pathlib import Path
import numpy as np
from trimode.engine.manifest import Manifest
from trimode.runtime.cpu import cpu_executor
from trimode.runtime.executor import BidirectionalStep, CausalStep

engine = Path(sys.argv[1])
if sys.argv[2] == "1":
    cpu_executor.FOLDERS = {CausalStep: "ar"}
executor = cpu_executor.CpuExecutor(engine, Manifest.read(engine))
ids, at, rows = np.arange(16)[None], np.array([0]), np.arange(16)[None]
executor.run(CausalStep.chain(0, ids, at, rows))
if sys.argv[2] == "2":
    executor.run(BidirectionalStep.block(0, ids, at, rows, np.array([16]), np.array([True])))
print(re.search(r"^Pss:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1])
"""


def resident_mib(engine: Path, engines: int = 2) -> float:
    """Proportional set size of a new process after one pass of each engine. engines: 1 for AR alone, or 2."""
    command = [sys.executable, "-c", _PROGRAM, str(engine), str(engines)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout) / 1024
