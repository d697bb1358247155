"""The lower bound of a kernel's time: each of its four terms, on hand-made kernels."""

from __future__ import annotations

import pytest

from scripts.gpu import cycle_estimate
from scripts.gpu.cycle_estimate import (
    BLOCK,
    CHIPS,
    MEMORY_LATENCY,
    SCHEDULERS,
    Binary,
    Launch,
    Pass,
    Work,
    pass_work,
    seconds,
)
from trimode.build.roofline import GPUS

H100, CHIP = GPUS["h100"], CHIPS["h100"]


def work(
    programs: int, warps: int = 4, resident: int = 2, waits: float = 0, instructions: float = 0, flops: float = 0
) -> Work:
    """A kernel with next to no bytes."""
    return Work("kernel", 1, moved=1, flops=flops, launch=Launch(programs, warps, resident, waits, instructions))


def test_without_a_launch_bytes_and_flops_count() -> None:
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


def test_a_pass_has_the_launches_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six a layer in AR and seven in a draft, two that select rows, and four before and behind the layers."""
    monkeypatch.setattr(cycle_estimate, "_binary", lambda *_: Binary(128, 48 << 10, 400, 1 << 20))
    for engine, tokens, of_a_layer in (("ar", 1, 6), ("ar", BLOCK, 6), ("diffusion", BLOCK, 7)):
        works = pass_work(H100, Pass(engine, tokens, tokens, 512), "bf16")
        assert sum(work.count for work in works) == 34 * of_a_layer + 2 + 4
        weights = sum(work.count * work.moved for work in works if "Product" in work.name or "Head" in work.name)
        # 7.95e9 weights of half a byte, with a scale of four bytes for 128, and 8 % of activations and sums.
        assert 7.95e9 * (0.5 + 4 / 128) < weights < (1.01 if tokens == 1 else 1.15) * 7.95e9 * (0.5 + 4 / 128)
        assert all(work.launch is not None and seconds(H100, work)[0] > 0 for work in works)
