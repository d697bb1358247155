"""One engine's launches, bound to its weights, the KV pool and the arena of temporary tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from trimode.engine.launch_list import LaunchList
from trimode.engine.precision import Real
from trimode.model.step import cache_inputs
from trimode.plugins.arena import ArenaPlan, tensor_bytes
from trimode.plugins.launches import PassShape, PlannedLaunch, plan_pass
from trimode.runtime.cuda.kernels import Kernels
from trimode.runtime.cuda.tactic_choice import Candidate, Output, TacticTimes, can_be_timed, tactic_key
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device import BoundLaunch, Device, Kernel
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.gpu_network import DeviceTensor, Enqueue

# Each byte of the activations that tactics are timed with: 0.01 in fp32 and bf16, and 1.06 in fp16.
_ACTIVATION = 0x3C


class _Placed(NamedTuple):
    """A launch with the addresses of its tensors."""

    planned: PlannedLaunch
    inputs: list[int]
    outputs: list[int]


class _Variant(NamedTuple):
    """What the launches of one operator and equal nodes share, with one tactic."""

    kernel: Kernel
    grid: tuple[int, int, int]
    scalars: list[int]


class _MovableLaunches:
    """The launches of a pass, bound to the slots of the KV pool from slot 0 on. They can be moved to other slots. A
    graph that was captured before keeps its slots.
    """

    def __init__(self, launches: list[BoundLaunch], pool: DeviceKvPool) -> None:
        self.launches = launches
        self._pool = pool
        self._slot = 0
        of_pool = ((launch, launch.addresses_in(pool.memory)) for launch in launches)
        self._moved = [(launch, arguments) for launch, arguments in of_pool if arguments]

    def move_to(self, slot: int) -> None:
        distance = self._pool.address(0, slot) - self._pool.address(0, self._slot)
        if distance:
            for launch, arguments in self._moved:
                launch.move(arguments, distance)
            self._slot = slot


class CudaNetwork:
    """addresses: of the weights and of the engine's other fixed inputs, by name. arena: its address; see
    :mod:`trimode.plugins.arena`. times: chooses tactics by time; None for the operators' rules.
    """

    windowed = False
    returns_one = True

    def __init__(
        self,
        device: Device,
        launches: LaunchList,
        kernels: Kernels,
        pool: DeviceKvPool,
        addresses: Mapping[str, int],
        arena: int,
        plan: ArenaPlan,
        real: Real,
        times: TacticTimes | None,
    ) -> None:
        self._device = device
        self._real = real
        self._times = times
        self._launches = launches
        self._kernels = kernels
        self._pool = pool
        self._arena_tensors = plan.offsets.keys()
        self._movable: dict[tuple[Bucket, tuple[int, ...]], _MovableLaunches] = {}
        self._fixed = {**addresses, **{name: arena + offset for name, offset in plan.offsets.items()}}

    def bind(self, bucket: Bucket, inputs: Mapping[str, DeviceTensor], results: Mapping[str, DeviceTensor]) -> Enqueue:
        """Passes that differ in their first slot only share their launches, which are moved to the slot."""
        at_first = bucket._replace(first_slot=0)
        key = at_first, tuple(tensor.address for tensor in (*inputs.values(), *results.values()))
        if key not in self._movable:
            prepared = [launch for _, launch in self.prepare(at_first, inputs, results)]
            self._movable[key] = _MovableLaunches(prepared, self._pool)
        movable = self._movable[key]

        def enqueue() -> None:
            movable.move_to(bucket.first_slot)
            for launch in movable.launches:
                self._device.launch_kernel(launch)

        return enqueue

    def prepare(
        self, bucket: Bucket, inputs: Mapping[str, DeviceTensor], results: Mapping[str, DeviceTensor]
    ) -> list[tuple[PlannedLaunch, BoundLaunch]]:
        """The launches of a pass, with their kernels and arguments."""
        addresses = dict(self._fixed)
        addresses |= {name: tensor.address for name, tensor in (*inputs.items(), *results.items())}
        for cache, name in enumerate(cache_inputs(self._pool.layers)):
            addresses[name] = self._pool.address(cache, bucket.first_slot)
        planned = plan_pass(self._launches, pass_shape(bucket))
        placed = [_place(launch, addresses) for launch in planned]
        alike: dict[Hashable, list[_Placed]] = {}
        for launch in placed:
            alike.setdefault(_sizes(launch.planned), []).append(launch)
        chosen = {sizes: self._variant(same[0].planned, self._tactic(same)) for sizes, same in alike.items()}
        if self._times is not None:
            self._times.save()
        return [(launch.planned, _bound(launch, chosen[_sizes(launch.planned)])) for launch in placed]

    def _tactic(self, launches: Sequence[_Placed]) -> int:
        """The tactic of launches of one operator and equal nodes."""
        planned, times = launches[0].planned, self._times
        fitting = self._kernels.fitting(planned.operator, planned.node)
        rule = planned.operator.default_tactic(planned.node, fitting)
        if times is None or len(fitting) == 1 or not can_be_timed(planned):
            return rule
        key = tactic_key(planned.operator, planned.node)
        known = times.known(key)
        return known if known in fitting else self._timed(times, key, launches, rule, fitting)

    def _timed(
        self, times: TacticTimes, key: str, launches: Sequence[_Placed], rule: int, fitting: Iterable[int]
    ) -> int:
        """Time the tactics of these launches on equal activations. Between passes, nothing in the arena is needed."""
        for launch in launches:
            named = zip(launch.planned.operator.inputs, launch.planned.inputs, launch.inputs, strict=True)
            for operand, name, address in named:
                if name in self._arena_tensors:
                    size = tensor_bytes(launch.planned.node.fixed[operand.name], operand.type, self._real)
                    self._device.fill(address, _ACTIVATION, size)
        first = launches[0].planned
        candidates: dict[int, Candidate] = {}
        for number in fitting:
            variant = self._variant(first, number)
            bound = [_bound(launch, variant) for launch in launches]
            candidates[number] = Candidate(number, bound)
        size = tensor_bytes(first.shapes[0], first.operator.outputs[0].type, self._real)
        return times.choose(key, candidates.pop(rule), list(candidates.values()), Output(launches[0].outputs[0], size))

    def _variant(self, planned: PlannedLaunch, tactic: int) -> _Variant:
        operator, node = planned.operator, planned.node
        return _Variant(
            self._kernels.load(operator, node, tactic),
            operator.grid(node, operator.tactics(node)[tactic]),
            [int(value) for value in operator.scalar_values(node)],
        )


def _sizes(planned: PlannedLaunch) -> Hashable:
    """Equal for launches of one operator and equal nodes, which differ in their tensors only."""
    node = planned.node
    return planned.operator.name, tuple(node.fixed.items()), tuple(node.attributes.items())


def _bound(launch: _Placed, variant: _Variant) -> BoundLaunch:
    kernel, grid, scalars = variant
    return BoundLaunch(kernel, grid, launch.inputs, scalars, launch.outputs)


def _place(launch: PlannedLaunch, addresses: dict[str, int]) -> _Placed:
    """Adds the addresses of outputs that alias an input. That of a tensor without elements is 0."""
    operator = launch.operator
    by_operand = dict(zip((operand.name for operand in operator.inputs), launch.inputs, strict=True))
    for name, operand in zip(launch.outputs, operator.outputs, strict=True):
        if operand.aliases is not None:
            addresses[name] = addresses[by_operand[operand.aliases]]
    given = zip(launch.inputs, (launch.node.fixed[operand.name] for operand in operator.inputs), strict=True)
    made = zip(launch.outputs, launch.shapes, strict=True)
    # A pass without asked ids has no tensor for them.
    inputs, outputs = ([addresses[name] if all(shape) else 0 for name, shape in tensors] for tensors in (given, made))
    return _Placed(launch, inputs, outputs)


def pass_shape(bucket: Bucket) -> PassShape:
    """``window`` is the pool's capacity, since attention reads the pool in place."""
    return PassShape(bucket.batch, bucket.step, bucket.rows, bucket.window, bucket.top_k, bucket.masked, bucket.asked)
