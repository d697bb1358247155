"""A machine whose GPU is a double: its memory is the host's, and it interprets kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tests.support.driver_double import DriverDouble, LibcudaDouble
from trimode.build.gpu.kernel_emission import NeededKernel
from trimode.runtime.gpu import device


@contextmanager
def interpreting_gpu(
    kernels: Mapping[bytes, NeededKernel], real: torch.dtype, *, computes: bool = True
) -> Iterator[DriverDouble]:
    """Gives this machine a GPU of compute capability 12.1. kernels, real, computes: of :class:`DriverDouble`."""
    driver = DriverDouble(kernels=kernels, real=real, computes=computes)
    with patch.object(device, "driver", driver), patch.object(ctypes, "CDLL", lambda _name: LibcudaDouble()):
        yield driver


class TorchOnHost:
    """:class:`scripts.gpu.torch_device.TorchDevice` for the double."""

    name = "cpu"

    def tensor(self, address: int, kind: str, shape: tuple[int, ...]) -> Tensor:
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        flat = np.frombuffer((ctypes.c_uint8 * size).from_address(address), kind)
        return torch.from_numpy(flat.reshape(shape))

    def synchronize(self) -> None:
        """PyTorch computes immediately here."""

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        return run
