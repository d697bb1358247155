"""Write safetensors files one tensor at a time. The library's own writer needs all tensors in memory.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header of
``{name: {dtype, shape, data_offsets}}`` padded with spaces to 8 bytes, then the tensors without gaps. Hence
every name, dtype and shape must be known before the first tensor is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.uint8): "U8",
}


class TensorSpec(NamedTuple):
    """A tensor's entry in the header."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_tensors(
    folder: Path, specs: Sequence[TensorSpec], arrays: Iterable[NDArray[Any]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write ``model.safetensors``, or numbered shards of at most ``shard_bytes`` (or one tensor) and their index.

    ``arrays`` yields the tensors in the order of ``specs``; one is held at a time.
    """
    shards = _shards(specs, shard_bytes)
    stream = iter(arrays)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys((spec.name for spec in shard), name)
        with (folder / name).open("wb") as file:
            _write_file(file, shard, islice(stream, len(shard)))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(spec.bytes for spec in specs)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.bytes
    return shards


def _write_file(file: BinaryIO, specs: Sequence[TensorSpec], arrays: Iterable[NDArray[Any]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (offset, offset + spec.bytes),
        }
        offset += spec.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for spec, array in zip(specs, arrays, strict=True):
        if (array.dtype, array.shape) != (spec.dtype, spec.shape):
            raise ValueError(f"{spec} expected, {array.dtype} {array.shape} found")
        # Viewed as bytes, without a copy: Python buffers have no bfloat16.
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
