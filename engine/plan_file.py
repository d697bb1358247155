"""TensorRT plan files whose weights are stored in the weight pool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import NonNegativeInt, PositiveInt

from trimode.common.errors import TriModeError
from trimode.engine.record import Record

_CHUNK = 1 << 24

# What the optimisation profiles of plans allow in a pass: rows of a sequence with a token mask, and asked ids of a row.
# The memory of masked logits is that of the largest pass: 6 bytes a row and token of the vocabulary.
MOST_MASKED_ROWS, MOST_ASKED = 16, 512


class Splice(Record):
    """A range of the pool that belongs before byte ``plan_offset`` of the plan file."""

    plan_offset: NonNegativeInt
    pool_offset: NonNegativeInt
    bytes: PositiveInt


class PlanEntry(Record):
    """How to assemble a plan from its file, ``private_bytes`` long, and the pool."""

    splices: tuple[Splice, ...]
    private_bytes: NonNegativeInt


def whole_plan(plan: Path, pool: Path, entry: PlanEntry) -> Iterator[bytes]:
    """The plan as the builder wrote it, in chunks. It need not fit into memory.

    Raises TriModeError if a file ends early.
    """
    with plan.open("rb") as rest, pool.open("rb") as weights:
        for splice in entry.splices:
            yield from read_chunks(rest, splice.plan_offset - rest.tell())
            weights.seek(splice.pool_offset)
            yield from read_chunks(weights, splice.bytes)
        yield from read_chunks(rest, entry.private_bytes - rest.tell())


def read_chunks(source: BinaryIO, length: int) -> Iterator[bytes]:
    """The next ``length`` bytes of a file, in chunks."""
    while length:
        chunk = source.read(min(_CHUNK, length))
        if not chunk:
            raise TriModeError(f"{source.name} ends {length} bytes early; build the engine again")
        length -= len(chunk)
        yield chunk
