"""The int4 weight format of ModelOpt's unified checkpoints.

A linear layer's matrix is [out, in]: W = q * scale, with one scale for each row and group of input channels.
``weight`` packs two's-complement nibbles along *out*: byte [i, j] holds row 2i in its low nibble and row 2i+1 in its
high one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INT4_MAX = 7


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Unpack [out / 2, in] bytes to [out, in] integers in -8..7."""
    low, high = packed << 4, packed & 0xF0
    rows = np.stack((low, high), axis=1).view(np.int8) >> 4
    return rows.reshape(-1, packed.shape[1])


def pack(integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack [out, in] integers in -8..7 to [out / 2, in] bytes. ``out`` must be even."""
    nibbles = integers.view(np.uint8) & np.uint8(0x0F)
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)


def quantize(weight: NDArray[np.float32], group: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round to nearest: integers [out, in] and scales [out, in / group], scale = largest magnitude / 7."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group, group)
    scale = np.abs(groups).max(axis=-1) / np.float32(INT4_MAX)
    # A scale of 1 keeps the zeros of an all-zero group.
    scale = np.where(scale == 0, np.float32(1), scale)
    integers = np.clip(np.rint(groups / scale[..., None]), -INT4_MAX - 1, INT4_MAX).astype(np.int8)
    return integers.reshape(rows, columns), scale


def dequantize(integers: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """q * scale, [out, in]."""
    rows, columns = integers.shape
    groups = integers.reshape(rows, scale.shape[1], -1).astype(np.float32)
    return (groups * scale[..., None].astype(np.float32)).reshape(rows, columns)
