"""Both engines of the cpu target hold the weights in the same pages, those of the pool's file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.random_checkpoint import write_random_checkpoint
from trimode.build.engine_builder import build_engine
from trimode.engine.files import POOL
from trimode.engine.manifest import Manifest
from trimode.model.checkpoint import Checkpoint

# 13 million parameters, beside which what a session has of its own is small.
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "vocab_size": 2048, "head_dim": 64}
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from trimode.engine.manifest import Manifest
from trimode.runtime.cpu.cpu_executor import CpuExecutor
from trimode.runtime.executor import BidirectionalStep, CausalStep

engine, ids, at = Path(sys.argv[1]), np.arange(8)[None], np.array([0])
manifest = Manifest.read(engine)
print(Path("/proc/self/smaps").read_text(), end="after\\n")
executor = CpuExecutor(engine, manifest, threads=1)
executor.run(CausalStep.chain(0, ids, at, ids))
executor.run(BidirectionalStep.block(0, ids, at, ids, np.array([8]), np.array([True])))
print(Path("/proc/self/smaps").read_text())
"""


def kibibytes(smaps: str, field: str, file: str = "") -> int:
    """Summed over the process's mappings, or over those of one file."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)
    found = (re.search(rf"^{field}: +(\d+) kB", mapping, re.MULTILINE) for mapping in mappings if file in mapping)
    return sum(int(match[1]) for match in found if match)


def test_the_pool_is_in_memory_once(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    build_engine(Checkpoint(write_random_checkpoint(tmp_path / "checkpoint", **SHAPE)), engine)
    weights = sum(entry.packed_bytes or entry.bytes for entry in Manifest.read(engine).pool) / 1024
    found = subprocess.run([sys.executable, "-c", PROGRAM, str(engine)], capture_output=True, text=True, check=True)
    before, after = found.stdout.split("after\n")
    resident, proportional = (kibibytes(after, field, str(engine / POOL)) for field in ("Rss", "Pss"))
    assert 0.9 * weights < proportional < 1.1 * weights
    assert resident > 1.9 * proportional, "a page is mapped by both sessions"
    assert kibibytes(after, "Anonymous") - kibibytes(before, "Anonymous") < weights / 2, "nothing is a copy"
