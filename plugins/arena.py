"""One allocation for all temporary tensors of an engine.

Tensors that are never needed at the same time share memory. Every tensor has one offset for all passes, with room for
the largest pass, because captured passes contain addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from trimode.engine.launch_list import LaunchList
from trimode.engine.manifest import Limits
from trimode.engine.precision import NUMPY_TYPES, Real
from trimode.plugins.launches import PassShape, PlannedLaunch, plan_pass
from trimode.plugins.operators import OPERATORS, AllReduce
from trimode.plugins.operators.attention import SPLIT_STEP

ALIGNMENT = 256
_BYTES = {"fp32": 4, "int64": 8, "int32": 4, "bool": 1, "int8": 1}


class ArenaPlan(NamedTuple):
    """offsets: of the tensors, by name. size: bytes of the arena."""

    offsets: dict[str, int]
    size: int


class _Lifetime(NamedTuple):
    """A tensor is written by launch ``first`` and read last by launch ``last``."""

    first: int
    last: int


def arena_of(engines: Sequence[LaunchList], real: Real, limits: Limits) -> list[ArenaPlan]:
    """Plans of the temporary tensors of engines whose passes follow one another, so that they share one arena."""
    return [
        plan_arena(
            (plan_pass(launches, shape) for shape in _shapes(limits)),
            real,
            (
                *(tensor.name for tensor in (*launches.inputs, *launches.weights)),
                *launches.results,
                *partial_sums(launches),
            ),
        )
        for launches in engines
    ]


def partial_sums(launches: LaunchList) -> list[str]:
    """The tensors of an engine that all ranks add up, in order."""
    return [launch.inputs[0] for launch in launches.launches if isinstance(OPERATORS[launch.operator], AllReduce)]


def _shapes(limits: Limits) -> Iterator[PassShape]:
    """Shapes among which each tensor has its largest size.

    Sizes grow with the batch. They grow with the step, except where an operator changes how it divides its work:
    attention does so at multiples of SPLIT_STEP, products behind the last step that they split.
    """
    batch, longest = limits.largest_pass
    steps = {*range(SPLIT_STEP, longest, SPLIT_STEP), min(SPLIT_STEP, longest), longest}
    for step, masked in product(sorted(steps), (False, True)):
        yield PassShape(batch, step, step, limits.capacity, limits.top_k, masked, asked=1)


def plan_arena(passes: Iterable[Sequence[PlannedLaunch]], real: Real, bound: Iterable[str]) -> ArenaPlan:
    """Offsets that serve all of ``passes``. bound: names of tensors whose memory is elsewhere."""
    elsewhere = set(bound)
    sizes: dict[str, int] = {}
    lifetimes: dict[str, _Lifetime] = {}
    for launches in passes:
        for index, launch in enumerate(launches):
            for name, shape, kind in launch.new_outputs():
                if name not in elsewhere:
                    size = -(-tensor_bytes(shape, kind, real) // ALIGNMENT) * ALIGNMENT
                    sizes[name] = max(sizes.get(name, 0), size)
                    lifetimes[name] = _joined(lifetimes.get(name), index)
            for name in launch.inputs:
                if name in lifetimes:
                    lifetimes[name] = _joined(lifetimes[name], index)
    return _placed(sizes, lifetimes)


def _joined(lifetime: _Lifetime | None, index: int) -> _Lifetime:
    """Passes of different shapes can have different launches, so a lifetime covers those of all passes."""
    if lifetime is None:
        return _Lifetime(index, index)
    return _Lifetime(min(lifetime.first, index), max(lifetime.last, index))


def _placed(sizes: Mapping[str, int], lifetimes: Mapping[str, _Lifetime]) -> ArenaPlan:
    """Each tensor, largest first, at the lowest offset that no tensor of an overlapping lifetime has."""
    offsets: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], lifetimes[name])):
        lifetime, offset = lifetimes[name], 0
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if lifetimes[other].first <= lifetime.last and lifetime.first <= lifetimes[other].last
        )
        for begin, end in taken:
            if offset + sizes[name] <= begin:
                break
            offset = max(offset, end)
        offsets[name] = offset
    return ArenaPlan(offsets, max((offsets[name] + sizes[name] for name in offsets), default=0))


def tensor_bytes(shape: Sequence[int], kind: str, real: Real) -> int:
    """Bytes of a tensor. kind: its element type."""
    item = NUMPY_TYPES[real].itemsize if kind == "real" else _BYTES[kind]
    return int(np.prod(shape)) * item
