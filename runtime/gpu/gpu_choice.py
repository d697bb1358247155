"""Choice of the GPU that runs an engine."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from trimode.common.errors import TriModeError
from trimode.common.gpus import find_gpus
from trimode.engine.kernel_library import runs_on


def choose_gpu(engine: Path, target: str, sms: Collection[int], portable: bool = False) -> int:
    """The driver's number of the first GPU that the engine was compiled for.

    sms: the engine's compute capabilities, 121 for 12.1. portable: whether a GPU may run code for an older one
    (:func:`trimode.engine.kernel_library.runs_on`). Raises TriModeError if this machine has no such GPU.
    """
    gpus = find_gpus()
    if not gpus.found:
        raise TriModeError(
            f"{engine} is for target {target} and needs an NVIDIA GPU; the CUDA driver here: {gpus.driver}. Install "
            f"the driver on a machine with a GPU, or build for this one: trimode build CHECKPOINT OUT --target cpu"
        )
    for gpu in gpus.found:
        if gpu.compute_capability in sms:
            return gpu.ordinal
    for gpu in gpus.found if portable else ():
        if any(runs_on(sm, gpu.compute_capability) for sm in sms):
            return gpu.ordinal
    compiled_for = ", ".join(map(str, sms))
    here = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus.found)
    raise TriModeError(
        f"{engine} was compiled for compute capabilities {compiled_for}; this machine has {here}; build it again: "
        f"trimode build CHECKPOINT OUT --target {target} --sm {gpus.found[0].compute_capability}"
    )
