"""Find the weights that two plans share and cut them out, so that the pool holds them once.

A plan contains its constants as one run of bytes, in the builder's order and layout. Plans of graphs with the same
constants contain the same run, except for small private constants that only one graph has, such as the scale of the
adapter's product. A private constant splits the run in two. Shared runs are found by comparing the plans byte by byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.engine.plan_file import PlanEntry, Splice, read_chunks

_CHUNK = 1 << 24
_ANCHOR = 256  # length of a byte string that is searched in the other plan
_REACH = 1 << 18  # largest size of a private constant, and distance from the end of a run to the next search
# Similar plans also share kernel code, which is not a weight. The gaps around code are larger than those in constants.
_LARGEST_GAP = 1 << 14
_DISTANCES = [_REACH, _REACH * 5 // 4, _REACH * 3 // 2, _REACH * 7 // 4]


class SharedRun(NamedTuple):
    """Bytes that both plans have: their offset in each, and their number."""

    first: int
    second: int
    length: int


class _Region(NamedTuple):
    """The part of each plan that is searched."""

    first: slice
    second: slice


def find_shared_runs(first: NDArray[np.uint8], second: NDArray[np.uint8], probe: bytes) -> list[SharedRun]:
    """The shared runs of two plans, in order. The search starts at ``probe``, the first bytes of a large constant.

    Raises RuntimeError if a plan does not contain the probe.
    """
    whole = _Region(slice(0, len(first)), slice(0, len(second)))
    middle = _extended(first, second, _find(first, probe), _find(second, probe), whole)
    return [*_runs_before(first, second, middle), middle, *_runs_after(first, second, middle)]


def cut_runs(plan: Path, runs: list[tuple[int, int]], pool: Path | None) -> PlanEntry:
    """Remove ``runs``, ordered pairs of (offset, length), from the file ``plan``, and write them to ``pool`` if it is
    given. Returns the record for assembling the plan again.
    """
    rest = plan.with_suffix(".rest")
    splices, kept, pooled = [], 0, 0
    with plan.open("rb") as source, rest.open("wb") as remainder:
        target = pool.open("wb") if pool else None
        try:
            for offset, length in runs:
                between = offset - source.tell()
                _copy(source, remainder, between)
                kept += between
                splices.append(Splice(plan_offset=kept, pool_offset=pooled, bytes=length))
                pooled += length
                if target:
                    _copy(source, target, length)
                else:
                    source.seek(length, 1)
            _copy(source, remainder, plan.stat().st_size - source.tell())
        finally:
            if target:
                target.close()
    rest.replace(plan)
    return PlanEntry(splices=tuple(splices), private_bytes=plan.stat().st_size)


def _runs_before(first: NDArray[np.uint8], second: NDArray[np.uint8], run: SharedRun) -> list[SharedRun]:
    found: list[SharedRun] = []
    while run.first > 2 * _REACH:
        region = _Region(slice(0, run.first), slice(0, run.second))
        near = slice(max(0, run.second - 2 * _REACH), run.second)
        best = _longest(first, second, [run.first - distance for distance in _DISTANCES], near, region)
        if best is None or _gap(best, run) > _LARGEST_GAP:
            break
        run = best
        found.insert(0, run)
    return found


def _runs_after(first: NDArray[np.uint8], second: NDArray[np.uint8], run: SharedRun) -> list[SharedRun]:
    found: list[SharedRun] = []
    while (end := run.first + run.length) + 2 * _REACH < len(first):
        start = run.second + run.length
        region = _Region(slice(end, len(first)), slice(start, len(second)))
        near = slice(start, start + 2 * _REACH)
        best = _longest(first, second, [end + distance for distance in _DISTANCES], near, region)
        if best is None or _gap(run, best) > _LARGEST_GAP:
            break
        run = best
        found.append(run)
    return found


def _gap(run: SharedRun, following: SharedRun) -> int:
    """Bytes between two runs in the plan that has more of them."""
    return max(following.first - run.first, following.second - run.second) - run.length


def _longest(
    first: NDArray[np.uint8], second: NDArray[np.uint8], places: list[int], near: slice, region: _Region
) -> SharedRun | None:
    """The longest run around one of ``places`` of the first plan, searched in the range ``near`` of the second. Several
    places are tried, because the bytes at one place may repeat, such as equal scales.
    """
    text = second[near].tobytes()
    found = []
    for place in places:
        match = text.find(first[place : place + _ANCHOR].tobytes())
        if match >= 0:
            found.append(_extended(first, second, place, near.start + match, region))
    return max(found, key=lambda run: run.length, default=None)


def _extended(
    first: NDArray[np.uint8], second: NDArray[np.uint8], in_first: int, in_second: int, region: _Region
) -> SharedRun:
    """The longest run around a pair of equal bytes, within the region."""
    before = _common(
        first[region.first.start : in_first][::-1],
        second[region.second.start : in_second][::-1],
    )
    after = _common(first[in_first : region.first.stop], second[in_second : region.second.stop])
    return SharedRun(in_first - before, in_second - before, before + after)


def _find(array: NDArray[np.uint8], probe: bytes) -> int:
    for start in range(0, len(array), _CHUNK):
        found = array[start : start + _CHUNK + len(probe)].tobytes().find(probe)
        if found >= 0:
            return start + found
    raise RuntimeError("a plan does not contain the embedding table unchanged")


def _common(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> int:
    """Length of the longest common prefix."""
    shortest = min(len(first), len(second))
    for at in range(0, shortest, _CHUNK):
        end = min(at + _CHUNK, shortest)
        differing = np.flatnonzero(first[at:end] != second[at:end])
        if len(differing):
            return at + int(differing[0])
    return shortest


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    for chunk in read_chunks(source, length):
        target.write(chunk)
