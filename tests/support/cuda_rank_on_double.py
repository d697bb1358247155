"""The process of a rank of target ``cuda`` whose GPU is a double that interprets kernels.

The parent names the file of the engine's kernels in the variable :data:`KERNELS`, and the number of GPUs in
:data:`GPUS`. :data:`FAULT` may name a fault of :data:`FAULTS`. Unused rows of the KV pool hold NaN.
"""

from __future__ import annotations

import ctypes
import os
import pickle
from pathlib import Path
from unittest.mock import patch

import torch

from tests.support import driver_double, missing_sum
from tests.support.driver_double import DriverDouble
from trimode.common.gpus import Gpu, Gpus
from trimode.engine.manifest import Manifest
from trimode.plugins.operators import AllReduce
from trimode.runtime.cuda.cuda_rank_executor import CudaRankExecutor
from trimode.runtime.cuda.exchange import Exchange
from trimode.runtime.gpu import device, gpu_choice
from trimode.runtime.gpu.device import Device
from trimode.runtime.ranks.group import Group
from trimode.runtime.ranks.rank_loop import follow

KERNELS, GPUS, FAULT = "TRIMODE_TEST_KERNELS", "TRIMODE_TEST_GPUS", "TRIMODE_TEST_FAULT"


def gpu_doubles() -> Gpus:
    found = [Gpu(ordinal=ordinal, name="GB10", compute_capability=121) for ordinal in range(int(os.environ[GPUS]))]
    return Gpus("CUDA 13.1", found)


def no_sum() -> None:
    """The kernel adds no other rank's partial sums, on any rank."""
    kernel_of = driver_double.kernel_of
    driver_double.kernel_of = lambda operator: (
        missing_sum.all_reduce_kernel if isinstance(operator, AllReduce) else kernel_of(operator)
    )


def other_places() -> None:
    """Rank 1 puts its partial sums where the ranks do not expect them."""
    init = Exchange.__init__

    def crossed(self: Exchange, device: Device, group: Group, manifest: Manifest) -> None:
        init(self, device, group, manifest)
        if group.rank == 1:
            self._partials.reverse()

    Exchange.__init__ = crossed  # type: ignore[method-assign]


FAULTS = {"no sum": no_sum, "other places": other_places, "none": lambda: None}


def load(*arguments: object) -> CudaRankExecutor:
    executor = CudaRankExecutor(*arguments)  # type: ignore[arg-type]
    ctypes.memset(executor.pool.address(0, 0), 0xFF, executor.pool.limit_bytes)
    return executor


if __name__ == "__main__":
    torch.set_num_threads(1)
    kernels = pickle.loads(Path(os.environ[KERNELS]).read_bytes())  # noqa: S301 - the test has written it
    FAULTS[os.environ.get(FAULT, "none")]()
    driver = DriverDouble(kernels=kernels, real=torch.float32)
    with patch.object(device, "driver", driver), patch.object(gpu_choice, "find_gpus", gpu_doubles):
        follow(load)
