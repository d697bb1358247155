"""The lower bound of a kernel's time: each of its four terms, on hand-made kernels."""

from __future__ import annotations

import pytest

from scripts.gpu.cycle_estimate import CHIPS, MEMORY_LATENCY, SCHEDULERS, Launch, Work, seconds
from trimode.build.roofline import GPUS

H100, CHIP = GPUS["h100"], CHIPS["h100"]


def work(
    programs: int, warps: int = 4, resident: int = 2, waits: float = 0, instructions: float = 0, flops: float = 0
) -> Work:
    """A kernel with next to no bytes."""
    return Work("kernel", 1, moved=1, flops=flops, launch=Launch(programs, warps, resident, waits, instructions))


def test_tensorrts_own_kernels_count_by_bytes_and_flops() -> None:
    assert seconds(H100, Work("norm", 1, moved=3350e6)) == (pytest.approx(1e-3), "memory")
    assert seconds(H100, Work("head", 1, moved=1, flops=989.4e9)) == (pytest.approx(1e-3), "tensor cores")


def test_a_small_grid_uses_its_own_multiprocessors_only() -> None:
    """32 programs on 132 multiprocessors: each runs at a 132nd of the GPU's peak."""
    took, bound = seconds(H100, work(32, flops=32e9))
    assert (took, bound) == (pytest.approx(1e9 / (H100.peak / 132)), "tensor cores")


def test_the_busiest_multiprocessor_decides() -> None:
    full, one_more = (seconds(H100, work(programs, instructions=1e4))[0] for programs in (132, 133))
    assert one_more == pytest.approx(2 * full)


def test_few_warps_leave_schedulers_idle() -> None:
    """Up to four warps of a multiprocessor take as long as one."""
    one, four, eight = (seconds(H100, work(132, warps=warps, instructions=1e4))[0] for warps in (1, SCHEDULERS, 8))
    assert one == pytest.approx(four) == pytest.approx(1e4 / CHIP.clock)
    assert eight == pytest.approx(2 * four)


def test_programs_beyond_the_resident_ones_wait_for_another_wave() -> None:
    resident = 132 * 2
    first, second = (seconds(H100, work(programs, waits=100)) for programs in (resident, resident + 1))
    assert first == (pytest.approx(100 * MEMORY_LATENCY / CHIP.clock), "latency")
    assert second[0] == pytest.approx(2 * first[0])
