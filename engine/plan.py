"""A TensorRT plan whose weights lie in the pool, put together again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from trimode.common.errors import TriModeError
from trimode.engine.manifest import PlanEntry

_CHUNK = 1 << 24


def whole_plan(plan: Path, pool: Path, entry: PlanEntry) -> Iterator[bytes]:
    """The plan as the builder wrote it, in chunks: nobody need hold it whole.

    Raises TriModeError if a file ends early.
    """
    with plan.open("rb") as rest, pool.open("rb") as weights:
        for splice in entry.splices:
            yield from read_chunks(rest, splice.plan_offset - rest.tell())
            weights.seek(splice.pool_offset)
            yield from read_chunks(weights, splice.bytes)
        yield from read_chunks(rest, entry.private_bytes - rest.tell())


def read_chunks(source: BinaryIO, length: int) -> Iterator[bytes]:
    """The next ``length`` bytes of a file."""
    while length:
        chunk = source.read(min(_CHUNK, length))
        if not chunk:
            raise TriModeError(f"{source.name} ends {length} bytes early; build the engine again")
        length -= len(chunk)
        yield chunk
