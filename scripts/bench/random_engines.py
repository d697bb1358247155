"""Engines with random weights for measurements on a CPU. Existing ones are used again."""

from __future__ import annotations

from pathlib import Path

from scripts.gpu.random_w4a16_checkpoint import write_checkpoint
from trimode.build.cpu.target import CpuTarget
from trimode.build.engine_builder import build_engine
from trimode.engine.targets.cpu import Activations
from trimode.model.checkpoint import Checkpoint

CAPACITY = 1024


def random_checkpoint(shape: str, folder: Path) -> Path:
    """The w4a16 checkpoint of ``shape`` with an int4 head."""
    checkpoint = folder / f"random-{shape}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, shape)
    return checkpoint


def random_engine(shape: str, folder: Path, activations: Activations) -> Path:
    """The engine of :func:`random_checkpoint` for target ``cpu``. All int4 matrices stay packed, small ones too."""
    engine = folder / f"random-{shape}-{activations}"
    if not engine.exists():
        target = CpuTarget(activations=activations, unpacked_bytes=0)
        build_engine(Checkpoint(random_checkpoint(shape, folder)), engine, target=target, capacity=CAPACITY)
    return engine
