"""PyTorch on its meta device, as a double of a GPU whose work is captured in a CUDA graph. It computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TorchOnMeta:
    """:class:`scripts.gpu.torch_device.TorchDevice`. Work that a CUDA graph cannot hold raises RuntimeError: copies
    between host and device, and values of tensors that the host reads, which the meta device does not have.
    """

    name = "meta"

    def tensor(self, address: int, kind: str, shape: tuple[int, ...]) -> Tensor:
        raise NotImplementedError("the meta device has no memory")

    def synchronize(self) -> None:
        """There is no work to wait for."""

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        with _OneDevice():
            run()
        return run


class _OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of both devices. A scalar of the host is an argument of a kernel, and no copy."""

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        copies = operation.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        if len({tensor.device.type for tensor in tensors if copies or tensor.dim()}) > 1:
            raise RuntimeError(f"{operation}: a copy between host and device cannot be captured")
        return found
