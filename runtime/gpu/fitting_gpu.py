"""The GPU of this machine that an engine runs on."""

from __future__ import annotations

from pathlib import Path

from trimode.common.errors import TriModeError
from trimode.common.gpus import find_gpus
from trimode.engine.manifest import Manifest
from trimode.engine.targets.rtx import RtxSection


def fitting_gpu(engine: Path, manifest: Manifest) -> int:
    """The first GPU that the engine's plans were compiled for; raises TriModeError if there is none."""
    sms = manifest.section(RtxSection).sms
    gpus = find_gpus()
    if not gpus.found:
        raise TriModeError(
            f"{engine} is for target rtx and needs an NVIDIA GPU; its driver here: {gpus.driver}. Install the driver "
            f"on a machine with a GPU, or build for this one: trimode build CHECKPOINT OUT --target cpu"
        )
    for gpu in gpus.found:
        if gpu.compute_capability in sms:
            return gpu.ordinal
    made_for = ", ".join(map(str, sms))
    here = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus.found)
    raise TriModeError(
        f"{engine} was compiled for compute capabilities {made_for}; this machine has {here}; build it again: "
        f"trimode build CHECKPOINT OUT --target rtx --sm {gpus.found[0].compute_capability}"
    )
