"""Steps to captured passes of two networks over one KV pool in the GPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.numpy import load_file

from trimode.common.errors import TriModeError
from trimode.engine.files import ADAPTER
from trimode.engine.manifest import Manifest
from trimode.engine.precision import NUMPY_TYPES
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Speculated, Step
from trimode.runtime.gpu.buckets import Bucket, bucket_of, padded_slots
from trimode.runtime.gpu.captured_passes import BoundPass, MovedGraphs, SinglePass, SpeculationCycle
from trimode.runtime.gpu.device import Buffer, Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.gpu_network import DeviceTensor, GpuNetwork
from trimode.runtime.gpu.pass_memory import PassLayout, PassMemory, Staging


class GpuExecutor:
    """Runs the networks of a GPU target, by the kind of step that each takes."""

    threads: int | None = None

    def __init__(
        self,
        device: Device,
        engine: Path,
        manifest: Manifest,
        pool: DeviceKvPool,
        networks: Mapping[type[Step], GpuNetwork],
    ) -> None:
        self.pool = pool
        self._device = device
        self._manifest = manifest
        self._max_batch, self._max_step = manifest.limits.largest_pass
        self._networks = networks
        self._adapter_memory: list[Buffer] = []
        self._adapter = self._load_adapter(engine)
        self._staging = {kind: self._allocate_staging(self._largest_ordinary_pass(kind)) for kind in networks}
        self._moved = MovedGraphs()
        self._bound: dict[Bucket, BoundPass] = {}
        self._passes: dict[Bucket, SinglePass] = {}
        self._cycles: dict[tuple[Bucket, Bucket], SpeculationCycle] = {}

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        bucket = self._admit(step)
        if bucket not in self._passes:
            self._passes[bucket] = SinglePass(self._device, self._bind(bucket), self._moved_graphs(bucket))
        return self._passes[bucket].run(step)

    def speculate(self, draft: BidirectionalStep, top_k: int | None = None) -> Speculated:
        if draft.token_mask is not None or draft.asked:
            raise ValueError("a speculation has no token masks and no asked ids")
        commit = draft.verification(top_k=top_k)
        buckets = self._admit(draft), self._admit(commit)
        if buckets not in self._cycles:
            bound, moved = [self._bind(bucket) for bucket in buckets], self._moved_graphs(buckets[0])
            self._cycles[buckets] = SpeculationCycle(self._device, buckets[0], bound[0], bound[1], moved)
        return self._cycles[buckets].run(draft, commit)

    @property
    def preparations(self) -> int:
        """Passes and cycles that were bound, and those that were captured later than in their first run."""
        return len(self._passes) + len(self._cycles) + self._moved.captured

    def padded_slots(self, first: int, last: int, step: int) -> tuple[int, int]:
        return padded_slots(first, last, step, self.pool.slots)

    def _moved_graphs(self, bucket: Bucket) -> MovedGraphs | None:
        return self._moved if bucket.first_slot else None

    def _admit(self, step: Step) -> Bucket:
        self._refuse(step)
        self._device.activate()
        network, limits = self._networks[type(step)], self._manifest.limits
        top_k = 1 if step.top_k == 1 and network.returns_one else limits.top_k
        return bucket_of(step, self._max_step, limits.capacity, network.windowed, top_k)

    def _bind(self, bucket: Bucket) -> BoundPass:
        if bucket not in self._bound:
            memory = PassMemory(self._device, self._staging_of(bucket), bucket, self._manifest)
            inputs = memory.inputs
            if bucket.kind is BidirectionalStep:
                inputs |= self._adapter
            self._bound[bucket] = BoundPass(memory, self._networks[bucket.kind].bind(bucket, inputs, memory.results))
        return self._bound[bucket]

    def _refuse(self, step: Step) -> None:
        """Raise for a step that would write outside its slots."""
        if step.first_slot + step.batch > self.pool.slots:
            raise ValueError(f"slots {step.first_slot} to {step.first_slot + step.batch} of {self.pool.slots}")
        if step.input_ids.shape[1] > self._max_step:
            raise TriModeError(
                f"a step of {step.input_ids.shape[1]} tokens exceeds the engine's max_step of {self._max_step}; "
                "use a shorter block, or build with a larger --max-step"
            )
        self.pool.reserve(step.rows_written)

    def _load_adapter(self, engine: Path) -> dict[str, DeviceTensor]:
        """The draft adapter, an input of the diffusion engine, on the device."""
        if self._manifest.adapter is None:
            return {}
        dtype, tensors = NUMPY_TYPES[self._manifest.precision.activations], {}
        for name, array in load_file(engine / ADAPTER).items():
            memory = self._device.store(array.astype(dtype), "the draft adapter")
            self._adapter_memory.append(memory)
            tensors[name] = DeviceTensor(memory.address, array.shape)
        return tensors

    def _staging_of(self, bucket: Bucket) -> Staging:
        """Memory for the passes of a bucket. What was allocated at first holds every ordinary pass; token masks and
        asked ids may need more. Buckets that are bound already keep theirs.
        """
        needed = PassLayout(bucket, self._manifest).end
        if self._staging[bucket.kind].device.size < needed:
            # Powers of two, so that what was allocated before adds up to less than this.
            self._staging[bucket.kind] = self._allocate_staging(1 << (needed - 1).bit_length())
        return self._staging[bucket.kind]

    def _largest_ordinary_pass(self, kind: type[Step]) -> int:
        """Bytes of the inputs and results of the largest pass without token masks and asked ids."""
        rows, top_k = self._max_step, self._manifest.limits.top_k
        return PassLayout(Bucket(kind, 0, self._max_batch, rows, rows, 0, top_k, False, 0), self._manifest).end

    def _allocate_staging(self, size: int) -> Staging:
        return Staging(self._device.allocate(size, "the engines' inputs"), *self._device.allocate_page_locked(size))
