"""Programmatic dependent launch on the double: which launches may begin before the work before them has ended."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.cuda.conftest import CASES, Engines, Gpu
from tests.runtime.cuda.test_cuda_loading import built_for
from tests.support.driver_double import DriverDouble, FaultError, LibcudaDouble
from trimode.runtime.cuda.cuda_network import CudaNetwork
from trimode.runtime.cuda.kernels import Kernels
from trimode.runtime.executor import CausalStep, SpeculatingExecutor
from trimode.runtime.gpu.device import BoundLaunch, Device
from trimode.runtime.loading import load_engine


def speculated(small: Engines, gpu: Gpu) -> tuple[DriverDouble, int]:
    """The driver after prompts and a cycle, and the number of passes whose kernels it got. A cycle is two passes. Each
    pass runs once, and those that begin at slot 0 are captured.
    """
    driver = gpu(small, computes=False)
    executor = load_engine(small.cuda, verify=False).executor
    assert isinstance(executor, SpeculatingExecutor)
    CASES.prefill(executor)
    assert driver.captures == 1
    executor.speculate(CASES.draft_step())
    assert driver.captures == 2
    return driver, len(CASES.lengths) + 1 + 2 * 2


@pytest.fixture
def every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches early in passes of any number of rows."""
    monkeypatch.setattr(CudaNetwork, "early_rows", 1 << 20)


@pytest.mark.usefixtures("every_pass")
def test_every_kernel_but_the_first_of_a_pass_is_launched_early(small: Engines, gpu: Gpu) -> None:
    """The first one follows a copy."""
    driver, passes = speculated(small, gpu)
    assert driver.early_launches == len(driver.kernel_launches) - passes > passes


@pytest.mark.parametrize(("batch", "step", "early"), [(1, 1, True), (1, 2, False), (2, 1, False)])
def test_passes_of_one_row_are_launched_early(small: Engines, gpu: Gpu, batch: int, step: int, early: bool) -> None:
    driver = gpu(small, computes=False)
    executor = load_engine(small.cuda, verify=False).executor
    for _ in range(batch):
        executor.pool.acquire()
    ids, rows = np.full((batch, step), 300), np.tile(np.arange(step), (batch, 1))
    executor.run(CausalStep.chain(0, ids, np.zeros(batch, np.int64), rows))
    assert driver.early_launches == (len(driver.kernel_launches) - 2 if early else 0)


def test_measurements_can_launch_every_kernel_in_turn(
    small: Engines, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaNetwork, "early_rows", 0)
    driver = gpu(small, computes=False)
    executor = load_engine(small.cuda, verify=False).executor
    executor.pool.acquire()
    executor.run(CausalStep.chain(0, np.array([[300]]), np.array([0]), np.array([[0]])))
    assert driver.kernel_launches
    assert driver.early_launches == 0


@pytest.mark.usefixtures("every_pass")
@pytest.mark.parametrize(("sm", "present"), [(89, 89), (80, 90)])
def test_kernels_that_do_not_wait_are_launched_in_turn(
    small: Engines, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sm: int, present: int
) -> None:
    """The kernels' compute capability decides, not the GPU's."""
    driver = gpu(small, computes=False)
    driver.capability = present
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: LibcudaDouble(capability=divmod(present, 10)))
    engine = built_for(small.cuda, (sm,), tmp_path / "engine")
    CASES.prefill(load_engine(engine, verify=False).executor)
    assert driver.kernel_launches
    assert driver.early_launches == 0


def first_of_a_pass_is_early(patch: pytest.MonkeyPatch) -> None:
    init = BoundLaunch.__init__

    def early(self: BoundLaunch, *arguments: object) -> None:
        init(self, *arguments[:-1], True)  # type: ignore[arg-type]

    patch.setattr(BoundLaunch, "__init__", early)


@pytest.mark.usefixtures("every_pass")
def test_an_early_launch_after_a_copy_is_a_fault(small: Engines, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    first_of_a_pass_is_early(monkeypatch)
    with pytest.raises(FaultError, match="an early launch does not follow a kernel"):
        speculated(small, gpu)


@pytest.mark.usefixtures("every_pass")
def test_an_early_launch_of_a_kernel_that_does_not_wait_is_a_fault(
    small: Engines, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = Kernels.__init__

    def waiting(self: Kernels, device: Device, folder: Path) -> None:
        init(self, device, folder)
        self.wait = True

    monkeypatch.setattr(Kernels, "__init__", waiting)
    with pytest.raises(FaultError, match="no kernel waits on compute capability 89"):
        test_kernels_that_do_not_wait_are_launched_in_turn(small, gpu, tmp_path, monkeypatch, 89, 89)
