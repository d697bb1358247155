"""What both KV pools promise, against a dictionary of sequences: each keeps its own rows, whoever comes and goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.driver_double import DriverDouble
from tests.support.random_checkpoint import config_fields
from trimode.common.errors import TriModeError
from trimode.model.config import ModelConfig
from trimode.runtime.gpu import device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.kv.host_kv_pool import KvPool
from trimode.runtime.kv.slots import KvSlots

SLOTS, CAPACITY = 5, 300
MODEL = ModelConfig.model_validate(config_fields(num_hidden_layers=2, num_key_value_heads=2, head_dim=4))


class Slots(RuleBasedStateMachine):
    """Every row of a sequence holds the sequence's own number."""

    def make(self) -> KvSlots:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.pool = self.make()
        self.lengths: dict[int, int] = {}  # sequence -> rows
        self.slot_of: dict[int, int] = {}
        self.next = 1

    @precondition(lambda self: len(self.slot_of) < SLOTS)
    @rule()
    def join(self) -> None:
        self.slot_of[self.next] = self.pool.acquire()
        self.lengths[self.next] = 0
        self.next += 1

    @precondition(lambda self: self.slot_of)
    @rule(data=st.data(), more=st.integers(1, 150))
    def write(self, data: st.DataObject, more: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.slot_of)))
        begin, end = self.lengths[sequence], min(self.lengths[sequence] + more, CAPACITY)
        rows = np.full((2 * 2, 2, end - begin, 4), sequence, np.float32)
        self.pool.reserve(end)
        self.pool.write_rows(self.slot_of[sequence], begin, rows.astype(self.dtype))
        self.lengths[sequence] = end

    @precondition(lambda self: self.slot_of)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.slot_of)))
        slot = self.slot_of.pop(sequence)
        del self.lengths[sequence]
        moved_from = self.pool.release(slot)
        for other, place in self.slot_of.items():
            if place == moved_from:
                self.slot_of[other] = slot

    @invariant()
    def every_sequence_has_its_rows(self) -> None:
        for sequence, slot in self.slot_of.items():
            rows = self.pool.read_rows(slot, 0, self.lengths[sequence])
            assert rows.shape == (4, 2, self.lengths[sequence], 4)
            assert (rows == sequence).all()

    @invariant()
    def active_slots_are_the_first_ones(self) -> None:
        assert sorted(self.slot_of.values()) == list(range(self.pool.active))


class OnTheHost(Slots):
    dtype = np.float32

    def make(self) -> KvSlots:
        return KvPool(layers=2, kv_heads=2, head_dim=4, capacity=CAPACITY)


class OnTheDevice(Slots):
    dtype = np.float16

    def make(self) -> KvSlots:
        self.patch = pytest.MonkeyPatch()
        return device_pool(self.patch)

    def teardown(self) -> None:
        self.patch.undo()


def device_pool(patch: pytest.MonkeyPatch, memory: int = 1 << 24) -> DeviceKvPool:
    patch.setattr(device, "driver", DriverDouble(memory))
    return DeviceKvPool(device.Device(0), MODEL, "fp16", SLOTS, CAPACITY)


TestOnTheHost = OnTheHost.TestCase
TestOnTheDevice = OnTheDevice.TestCase
TestOnTheHost.settings = TestOnTheDevice.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_the_devices_pool_begins_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = device_pool(monkeypatch)
    assert all((pool.read_rows(slot, 0, CAPACITY) == 0).all() for slot in range(SLOTS))


def test_single_rows_are_found_where_they_were_put(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, rng = device_pool(monkeypatch), np.random.default_rng(0)
    kept: dict[tuple[int, int], Any] = {}
    for slot in range(SLOTS):
        for start in (0, 7, CAPACITY - 3):
            kept[slot, start] = rng.standard_normal((4, 2, 3, 4)).astype(np.float16)
            pool.write_rows(slot, start, kept[slot, start])
    for (slot, start), rows in kept.items():
        np.testing.assert_array_equal(pool.read_rows(slot, start, start + 3), rows)
        np.testing.assert_array_equal(pool.read_rows(slot, start + 1, start + 2), rows[:, :, 1:2])


@pytest.mark.parametrize("where", ["host", "device"])
def test_the_rows_of_a_path_are_moved_together(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources may lie among the rows that are written. The other slots and the rows before and behind keep theirs."""
    on_host = where == "host"
    pool: KvSlots = OnTheHost().make() if on_host else device_pool(monkeypatch)
    rng = np.random.default_rng(1)
    for _ in range(3):
        pool.acquire()
    kept = [rng.standard_normal((4, 2, 20, 4)).astype(np.float32 if on_host else np.float16) for _ in range(3)]
    for slot, rows in enumerate(kept):
        pool.write_rows(slot, 0, rows)
    pool.move_rows(1, 5, [6, 7, 9, 14])
    expected = kept[1].copy()
    expected[:, :, 5:9] = kept[1][:, :, [6, 7, 9, 14]]
    for slot, rows in enumerate((kept[0], expected, kept[2])):
        np.testing.assert_array_equal(pool.read_rows(slot, 0, 20), rows)


def test_what_the_devices_pool_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = device_pool(monkeypatch)
    with pytest.raises(ValueError, match="slot 0 is not active"):
        pool.release(0)
    with pytest.raises(TriModeError, match="301 tokens exceeds the engine's capacity of 300"):
        pool.reserve(301)
    with pytest.raises(ValueError, match="rows 299 to 301 of 300"):
        pool.read_rows(0, 299, 301)
    for _ in range(SLOTS):
        assert pool.most_rows(pool.active + 1) == CAPACITY
        pool.acquire()
    assert pool.most_rows(SLOTS + 1) == 0
    with pytest.raises(TriModeError, match="all 5 slots of the KV pool are taken"):
        pool.acquire()


def test_a_gpu_too_small_for_the_pool_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TriModeError, match=r"no 0\.00 GB left for the KV pool.*--capacity") as caught:
        device_pool(monkeypatch, memory=1000)
    assert "\n" not in str(caught.value)


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = device_pool(monkeypatch)
    driver: Any = device.driver
    before = driver.free
    del pool
    assert driver.free > before
