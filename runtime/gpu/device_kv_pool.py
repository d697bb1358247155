"""The KV pool in the GPU's memory: a fixed number of slots of a fixed number of rows."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np

from trimode.common.errors import TriModeError
from trimode.engine.precision import NUMPY_TYPES, Real
from trimode.model.config import ModelConfig
from trimode.runtime.gpu.device import Device, Runs
from trimode.runtime.kv.slots import Rows


class SlotBudget(NamedTuple):
    """slots: of ``capacity`` rows each."""

    slots: int
    capacity: int

    def most_rows(self, sequences: int) -> int:
        """The most rows that each of ``sequences`` sequences can have; 0 if there are not so many slots."""
        return self.capacity if sequences <= self.slots else 0


class DeviceKvPool:
    """Caches in the order: keys of layer 0, values of layer 0, keys of layer 1, ... Each has the shape
    [slots, kv_heads, capacity, head_dim].

    Slots are assigned as in :class:`trimode.runtime.kv.host_kv_pool.KvPool`. Addresses never change, because captured
    passes contain them.
    """

    def __init__(self, device: Device, model: ModelConfig, dtype: Real, slots: int, capacity: int) -> None:
        self.capacity = capacity
        self.slots = slots
        self.active = 0
        self.shape = (model.num_key_value_heads, capacity, model.head_dim)
        self.layers = model.num_hidden_layers
        self._caches = 2 * self.layers
        self._device = device
        self._dtype = NUMPY_TYPES[dtype]
        self._row = model.head_dim * self._dtype.itemsize
        self._head = capacity * self._row
        self._slot = model.num_key_value_heads * self._head
        self.memory = device.allocate(self._caches * slots * self._slot, "the KV pool")
        # Rows past a sequence's end are masked, but uninitialised memory may hold a NaN, and 0 * NaN is NaN.
        device.fill(self.memory.address, 0, self.memory.size)
        device.synchronize()

    def address(self, cache: int, slot: int) -> int:
        """The address of ``slot`` in a cache, numbered as in :func:`trimode.model.step.cache_inputs`."""
        return self.memory.address + (cache * self.slots + slot) * self._slot

    @property
    def limit_bytes(self) -> int:
        return self.memory.size

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's keys and values, over all layers."""
        return self._caches * self.shape[0] * self._row

    @property
    def budget(self) -> SlotBudget:
        return SlotBudget(self.slots, self.capacity)

    def most_rows(self, sequences: int) -> int:
        """As :meth:`SlotBudget.most_rows`."""
        return self.budget.most_rows(sequences)

    def acquire(self, rows: int | None = None) -> int:  # noqa: ARG002 - every slot has rows for the longest sequence
        """Activate the first slot past the active ones; raises TriModeError if all are taken."""
        if self.active == self.slots:
            raise TriModeError(
                f"all {self.slots} slots of the KV pool are taken; build with a larger --max-batch for more at a time"
            )
        self.active += 1
        return self.active - 1

    def release(self, slot: int, rows: int | None = None) -> int:  # noqa: ARG002 - the pool is allocated once
        """Give a slot back. The last active sequence moves into it; returns that sequence's former slot."""
        if not 0 <= slot < self.active:
            raise ValueError(f"slot {slot} is not active; {self.active} are")
        last = self.active - 1
        if slot != last:
            self._device.activate()
            for cache in range(self._caches):
                self._device.copy(self.address(cache, slot), self.address(cache, last), self._slot)
        self.active = last
        return last

    def reserve(self, rows: int) -> None:
        """Do nothing up to the capacity, for which memory is always there. Raises TriModeError beyond it."""
        if rows > self.capacity:
            raise TriModeError(f"a sequence of {rows} tokens exceeds the engine's capacity of {self.capacity}")

    def read_rows(self, slot: int, start: int, stop: int) -> Rows:
        """A copy of a sequence's rows from ``start`` to before ``stop``, in the pool's type."""
        heads, _, head_dim = self.shape
        rows = np.empty((self._caches, heads, stop - start, head_dim), self._dtype)
        self._copy_rows(slot, start, rows, upload=False)
        return rows

    def move_rows(self, slot: int, start: int, sources: Many[int]) -> None:
        """Copy a sequence's rows ``sources`` to rows ``start``, ``start`` + 1, ... Sources ascend, and none lies before
        the row that it is copied to.

        One copy on the stream for each cache and row.
        """
        self._device.activate()
        for cache in range(self._caches):
            base = self.address(cache, slot)
            for row, source in enumerate(sources, start):
                if row != source:
                    to, origin = (Runs(base + at * self._row, self._head) for at in (row, source))
                    self._device.copy_rows(to, origin, self._row, self.shape[0])

    def write_rows(self, slot: int, start: int, rows: Rows) -> None:
        """Write rows from :meth:`read_rows` into a sequence from row ``start`` on, within the capacity."""
        self._copy_rows(slot, start, np.ascontiguousarray(rows), upload=True)

    def _copy_rows(self, slot: int, start: int, rows: Rows, upload: bool) -> None:
        heads, count = rows.shape[1:3]
        if start + count > self.capacity:
            raise ValueError(f"rows {start} to {start + count} of {self.capacity}")
        width = count * self._row
        self._device.activate()
        for cache in range(self._caches):
            here = Runs(self.address(cache, slot) + start * self._row, self._head)
            host = Runs(rows[cache].ctypes.data, width, on_device=False)
            self._device.copy_rows(*((here, host) if upload else (host, here)), width, heads)
        self._device.synchronize()
