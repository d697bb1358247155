"""PyTorch on the device of the GPU check: views of memory that the runtime allocated, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class TorchDevice(Protocol):
    """name: PyTorch's name of the device."""

    name: str

    def tensor(self, address: int, kind: str, shape: tuple[int, ...]) -> Tensor:
        """Device memory as a tensor. kind: its type as numpy writes it, such as ``<f4``."""
        ...

    def synchronize(self) -> None:
        """Wait for PyTorch's work."""
        ...

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """A function that repeats the work of ``run``. Raises RuntimeError if it cannot be captured."""
        ...


class TorchGpu:
    name = "cuda"

    def tensor(self, address: int, kind: str, shape: tuple[int, ...]) -> Tensor:
        return torch.as_tensor(_DeviceArray(address, kind, shape), device=self.name)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self.synchronize()
        # Libraries allocate their workspace for a stream in its first run.
        with torch.cuda.stream(stream):
            run()
        self.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run()
        return graph.replay


class _DeviceArray:
    """Device memory as an array that torch can take."""

    def __init__(self, address: int, kind: str, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "typestr": kind, "shape": shape, "version": 3}
