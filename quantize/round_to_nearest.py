"""Round to nearest, one tensor at a time: needs memory for the largest tensor only, and no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.common.progress import Progress
from trimode.model import int4
from trimode.model.checkpoint import Checkpoint, linear_shapes, vector_shapes
from trimode.quantize.row_slices import row_slices
from trimode.quantize.safetensors_stream import TensorSpec, write_tensors


def write_rounded(checkpoint: Checkpoint, folder: Path, modules: list[str], group: int, progress: Progress) -> None:
    """Write the checkpoint's tensors: the linear layers in ``modules`` as int4, the others unchanged."""
    write_tensors(folder, _specs(checkpoint, modules, group), _arrays(checkpoint, modules, group, progress))


def _specs(checkpoint: Checkpoint, modules: list[str], group: int) -> list[TensorSpec]:
    shapes = linear_shapes(checkpoint.config)
    specs = []
    for module in modules:
        rows, columns = shapes[module]
        specs.append(TensorSpec(f"{module}.weight", np.dtype(np.uint8), (rows // 2, columns)))
        specs.append(TensorSpec(f"{module}.weight_scale", np.dtype(np.float32), (rows, columns // group)))
    for name in _kept(checkpoint, modules):
        array = checkpoint.vector(name)
        specs.append(TensorSpec(name, array.dtype, array.shape))
    return specs


def _arrays(checkpoint: Checkpoint, modules: list[str], group: int, progress: Progress) -> Iterator[NDArray[Any]]:
    """The tensors of :func:`_specs`, in its order."""
    for done, module in enumerate(modules, start=1):
        yield from _rounded(checkpoint.vector(f"{module}.weight"), group)
        progress("quantize", done, len(modules))
    for name in _kept(checkpoint, modules):
        yield checkpoint.vector(name)


def _kept(checkpoint: Checkpoint, modules: list[str]) -> Iterator[str]:
    yield from vector_shapes(checkpoint.config)
    yield from (f"{module}.weight" for module in linear_shapes(checkpoint.config) if module not in modules)


def _rounded(weight: NDArray[Any], group: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """``weight`` [out / 2, in] and ``weight_scale`` [out, in / group] of a matrix [out, in]."""
    rows, columns = weight.shape
    packed = np.empty((rows // 2, columns), np.uint8)
    scale = np.empty((rows, columns // group), np.float32)
    for part in row_slices((rows, columns)):
        integers, scale[part] = int4.quantize(weight[part].astype(np.float32), group)
        packed[part.start // 2 : part.stop // 2] = int4.pack(integers)
    return packed, scale
