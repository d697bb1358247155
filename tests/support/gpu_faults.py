"""Faults of the base of all GPU targets, planted by a patch, that tests of every GPU target must detect."""

from __future__ import annotations

from typing import Any

import pytest

from trimode.runtime.executor import BidirectionalStep
from trimode.runtime.gpu import captured_passes, gpu_executor, plan_context, plan_executor
from trimode.runtime.gpu.buckets import Bucket
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.gpu.gpu_executor import GpuExecutor
from trimode.runtime.gpu.pass_memory import PassMemory


def stale_graph(patch: pytest.MonkeyPatch) -> None:
    """A graph captured for other slots is replayed."""
    admit, first = GpuExecutor._admit, {}

    def admitting(self: Any, step: Any) -> Any:
        bucket = admit(self, step)
        return first.setdefault(bucket._replace(first_slot=0), bucket)

    patch.setattr(GpuExecutor, "_admit", admitting)


def slot_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """The last sequence of a batch is read from the next slot."""
    address = DeviceKvPool.address
    patch.setattr(
        DeviceKvPool,
        "address",
        lambda self, cache, slot: address(self, cache, slot + 1 if slot == 1 else slot),
    )


def padding_is_attended_to(patch: pytest.MonkeyPatch) -> None:
    """Padding counts as tokens of the block."""
    put = PassMemory.put

    def putting(self: Any, step: Any) -> None:
        put(self, step)
        if "step_lengths" in self._views:
            self._views["step_lengths"][...] = self._views["input_ids"].shape[1]

    patch.setattr(PassMemory, "put", putting)


def padding_attends_to_nothing(patch: pytest.MonkeyPatch) -> None:
    put = PassMemory.put

    def putting(self: Any, step: Any) -> None:
        put(self, step)
        if "block_mask" in self._views:
            self._views["block_mask"][:, step.input_ids.shape[1] :] = False

    patch.setattr(PassMemory, "put", putting)


def masks_not_uploaded(patch: pytest.MonkeyPatch) -> None:
    """Every token is legal."""
    put = PassMemory.put

    def putting(self: Any, step: Any) -> None:
        put(self, step)
        if "token_mask" in self._views:
            self._views["token_mask"][...] = 2**32 - 1

    patch.setattr(PassMemory, "put", putting)


def asked_ids_in_another_order(patch: pytest.MonkeyPatch) -> None:
    put = PassMemory.put

    def putting(self: Any, step: Any) -> None:
        put(self, step)
        if "asked_ids" in self._views:
            self._views["asked_ids"][...] = self._views["asked_ids"][:, ::-1].copy()

    patch.setattr(PassMemory, "put", putting)


def masked_buckets_are_ordinary(patch: pytest.MonkeyPatch) -> None:
    """A pass with a mask replays the pass without."""
    bucket_of = gpu_executor.bucket_of
    patch.setattr(gpu_executor, "bucket_of", lambda *given: bucket_of(*given)._replace(masked=False))


def draft_not_copied(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(captured_passes.SpeculationCycle, "_copy_drafted", lambda _self: None)


def results_taken_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(captured_passes.CapturedWork, "run", lambda self: self._enqueue())


def padded_past_the_capacity(patch: pytest.MonkeyPatch) -> None:
    bucket_of = gpu_executor.bucket_of
    patch.setattr(gpu_executor, "bucket_of", lambda *given: _padded(bucket_of(*given)))


def _padded(bucket: Bucket) -> Bucket:
    return bucket._replace(step=1 << (bucket.step - 1).bit_length())


# Of targets whose engines are plans.


def wrong_alias(patch: pytest.MonkeyPatch) -> None:
    """A layer's updated keys are bound to the memory of its values, and its values to that of its keys."""
    cache_outputs = plan_context.cache_outputs

    def crossed(layers: int) -> list[str]:
        first, second, *rest = cache_outputs(layers)
        return [second, first, *rest]

    patch.setattr(plan_context, "cache_outputs", crossed)


def keys_of_another_layer(patch: pytest.MonkeyPatch) -> None:
    """One engine uses the keys of layer 0 as those of layer 1, aliases included."""
    address, bind = DeviceKvPool.address, GpuExecutor._bind
    crossed = {0: 2, 2: 0}

    def binding(self: Any, bucket: Bucket) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if bucket.kind is BidirectionalStep:
                inner.setattr(
                    DeviceKvPool, "address", lambda self, cache, slot: address(self, crossed.get(cache, cache), slot)
                )
            return bind(self, bucket)

    patch.setattr(GpuExecutor, "_bind", binding)


def rows_of_masks_not_split(patch: pytest.MonkeyPatch) -> None:
    """A pass has more rows with a mask than the plans take."""
    patch.setattr(plan_executor, "MOST_MASKED_ROWS", 1 << 20)
