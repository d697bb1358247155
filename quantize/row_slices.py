"""Slices of a matrix's rows, so that float32 copies stay small."""

from __future__ import annotations

from collections.abc import Iterator

SLICE_ELEMENTS = 1 << 22


def row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """Consecutive slices of the rows of a [rows, columns] matrix, each of an even number of rows (int4 packs pairs)."""
    rows, columns = shape
    step = max(2, SLICE_ELEMENTS // columns // 2 * 2)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
