"""The layout of int4 matrices for our GPU kernels, which :class:`trimode.plugins.operators.Int4Product` defines."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trimode.plugins.operators.int4_product import PAIRED, TILE_COLUMNS, WORD, unit_of

Number = TypeVar("Number", bound=np.generic)


def pair_rows(array: NDArray[Number], half: int) -> NDArray[Number]:
    """Rows of ``array``, which are columns of W, in the order of pairs: row i of the first ``half`` rows and row i of
    the next ones are a pair; likewise in each further ``2 * half`` rows. half: a multiple of :data:`PAIRED`.
    """
    blocks = array.reshape(-1, 2, half // PAIRED, PAIRED, *array.shape[1:])
    return blocks.swapaxes(1, 2).reshape(array.shape)


def pack_tiles(integers: NDArray[np.int8], group: int) -> NDArray[np.int32]:
    """Words [tiles, units, TILE_COLUMNS, words of a unit] of a linear layer's integers [out, in] in -8..7.

    Columns of W are rows of ``integers``. Columns of padding are zeros, which are 8 in each nibble.
    """
    columns, inner = integers.shape
    words = unit_of(group) // WORD
    tiles = np.empty((-(-columns // TILE_COLUMNS), inner // (WORD * words), TILE_COLUMNS, words), np.uint32)
    # One tile at a time: the biased integers of a whole vocabulary would take gigabytes.
    for index, tile in enumerate(tiles):
        part = integers[index * TILE_COLUMNS : (index + 1) * TILE_COLUMNS]
        biased = np.full((TILE_COLUMNS, inner), 8, np.uint32)
        biased[: len(part)] += part.astype(np.uint32)
        nibbles = biased.reshape(TILE_COLUMNS, -1, WORD, words)
        shifted = nibbles << (4 * np.arange(WORD, dtype=np.uint32))[:, None]
        tile[:] = np.bitwise_or.reduce(shifted, axis=2).swapaxes(0, 1)
    return tiles.view(np.int32)
