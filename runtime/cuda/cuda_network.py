"""One engine's launches, bound to its weights, the KV pool and the arena of temporary tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from trimode.engine.launch_list import LaunchList
from trimode.engine.precision import Real
from trimode.model.step import cache_inputs
from trimode.plugins.launches import PassShape, PlannedLaunch, plan_pass
from trimode.plugins.operators.attention import SPLIT_STEP
from trimode.runtime.cuda.arena import ArenaPlan, plan_arena
from trimode.runtime.cuda.kernels import Kernels
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device import BoundLaunch, Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.gpu_network import DeviceTensor, Enqueue


class CudaNetwork:
    """addresses: of the weights and of the engine's other fixed inputs, by name. arena: its address; see
    :func:`arena_of`.
    """

    windowed = False
    returns_one = True
    # The most rows of a pass whose kernels are launched early (programmatic dependent launch). On an H100, one row
    # gained a tenth, and 32 rows lost as much.
    early_rows = 1

    def __init__(
        self,
        device: Device,
        launches: LaunchList,
        kernels: Kernels,
        pool: DeviceKvPool,
        addresses: Mapping[str, int],
        arena: int,
        plan: ArenaPlan,
    ) -> None:
        self._device = device
        self._launches = launches
        self._kernels = kernels
        self._pool = pool
        self._fixed = {**addresses, **{name: arena + offset for name, offset in plan.offsets.items()}}

    def bind(self, bucket: Bucket, inputs: Mapping[str, DeviceTensor], results: Mapping[str, DeviceTensor]) -> Enqueue:
        prepared = [launch for _, launch in self.prepare(bucket, inputs, results)]

        def enqueue() -> None:
            for launch in prepared:
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
        early = self._kernels.wait and bucket.batch * bucket.step <= self.early_rows
        # The first kernel follows a copy, which it has to wait for.
        return [(launch, self._prepare(launch, addresses, early and index > 0)) for index, launch in enumerate(planned)]

    def _prepare(self, launch: PlannedLaunch, addresses: dict[str, int], early: bool) -> BoundLaunch:
        """Adds the addresses of outputs that alias an input."""
        operator, node = launch.operator, launch.node
        by_operand = dict(zip((operand.name for operand in operator.inputs), launch.inputs, strict=True))
        for name, operand in zip(launch.outputs, operator.outputs, strict=True):
            if operand.aliases is not None:
                addresses[name] = addresses[by_operand[operand.aliases]]
        kernel, tactic = self._kernels.choose(operator, node)
        return BoundLaunch(
            kernel,
            operator.grid(node, tactic),
            [addresses[name] for name in launch.inputs],
            [int(value) for value in operator.scalar_values(node)],
            [addresses[name] for name in launch.outputs],
            early,
        )


def pass_shape(bucket: Bucket) -> PassShape:
    """``window`` is the pool's capacity, since attention reads the pool in place."""
    return PassShape(bucket.batch, bucket.step, bucket.rows, bucket.window, bucket.top_k, bucket.masked, bucket.asked)


def arena_of(engines: Sequence[LaunchList], real: Real, largest: PassShape) -> list[ArenaPlan]:
    """Plans of the temporary tensors of engines whose passes follow one another, so that they share one arena."""
    return [
        plan_arena(
            (plan_pass(launches, shape) for shape in _shapes(largest)),
            real,
            (*(tensor.name for tensor in (*launches.inputs, *launches.weights)), *launches.results),
        )
        for launches in engines
    ]


def _shapes(largest: PassShape) -> Iterator[PassShape]:
    """Shapes among which each tensor has its largest size.

    Sizes grow with the batch. They grow with the step, except where an operator changes how it divides its work:
    attention does so at multiples of SPLIT_STEP, products behind the last step that they split.
    """
    steps = {*range(SPLIT_STEP, largest.step, SPLIT_STEP), min(SPLIT_STEP, largest.step), largest.step}
    for step, masked in product(sorted(steps), (False, True)):
        yield largest._replace(step=step, rows=step, masked=masked)
