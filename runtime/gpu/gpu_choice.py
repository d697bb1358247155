"""Choice of the GPUs that run an engine."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from trimode.common.errors import TriModeError
from trimode.common.gpus import find_gpus
from trimode.engine.kernel_library import runs_on

# Set to 1, ranks may share GPUs. Their passes then take turns, which is for tests on a machine with few GPUs.
SHARE = "TRIMODE_SHARE_GPUS"


def choose_gpu(engine: Path, target: str, sms: Collection[int]) -> int:
    """The driver's number of the GPU of an engine without ranks, as :func:`choose_gpus` chooses it."""
    return choose_gpus(engine, target, sms)[0]


def choose_gpus(engine: Path, target: str, sms: Collection[int], ranks: int = 1, portable: bool = False) -> list[int]:
    """The driver's numbers of the first GPUs that the engine was compiled for, one for each rank.

    sms: the engine's compute capabilities, 121 for 12.1. portable: whether a GPU may run code for an older one
    (:func:`trimode.engine.kernel_library.runs_on`). All are of one compute capability, since their kernels must give
    the same bits. Raises TriModeError if this machine has too few such GPUs.
    """
    gpus = find_gpus()
    if not gpus.found:
        raise TriModeError(
            f"{engine} is for target {target} and needs an NVIDIA GPU; the CUDA driver here: {gpus.driver}. Install "
            f"the driver on a machine with a GPU, or build for this one: trimode build CHECKPOINT OUT --target cpu"
        )
    native = [gpu.compute_capability for gpu in gpus.found if gpu.compute_capability in sms]
    others = [gpu.compute_capability for gpu in gpus.found if any(runs_on(sm, gpu.compute_capability) for sm in sms)]
    fitting: list[int] = []
    for capability in dict.fromkeys((*native, *(others if portable else ()))):
        alike = [gpu.ordinal for gpu in gpus.found if gpu.compute_capability == capability]
        if os.environ.get(SHARE) == "1":
            alike = [alike[rank % len(alike)] for rank in range(ranks)]
        if len(alike) >= ranks:
            return alike[:ranks]
        fitting = max(fitting, alike, key=len)
    compiled_for = ", ".join(map(str, sms))
    here = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus.found)
    if fitting:
        raise TriModeError(
            f"{engine} is divided among {ranks} ranks and needs as many GPUs of one compute capability among "
            f"{compiled_for}; this machine has {here}; build for fewer: trimode build CHECKPOINT OUT --target {target} "
            f"--tp {len(fitting)}"
        )
    raise TriModeError(
        f"{engine} was compiled for compute capabilities {compiled_for}; this machine has {here}; build it again: "
        f"trimode build CHECKPOINT OUT --target {target} --sm {gpus.found[0].compute_capability}"
    )
