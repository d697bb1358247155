"""Settings of OpenMP, the threads that torch computes with."""

from __future__ import annotations

import os

# GNU's OpenMP (torch's own) and LLVM's or Intel's.
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


def wait_passively() -> None:
    """Let idle OpenMP threads sleep instead of spinning.

    Spinning threads take the processor from the one that they wait for when the machine is busy. OpenMP reads these
    variables when its library is loaded, so call this before the first ``import torch``; later it has no effect on this
    process. Variables that are set already are kept.
    """
    for name, value in _PASSIVE.items():
        os.environ.setdefault(name, value)
