"""The estimate of tensor parallelism against calculations by hand."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.gpu.ranks_estimate import PAIRS, rows_of
from trimode.build.roofline import CONFIG_8B, CONTEXT, FORMATS, GPUS, PassShape, least_bytes, uniform_matrix_bytes
from trimode.build.scale_out import LINKS, Link, estimates, exchange_seconds, rank_seconds, sum_seconds

ROOT = Path(__file__).resolve().parents[2]
H100, W4A16 = GPUS["h100"], FORMATS["w4a16"]
ONE = PassShape(batch=1, step=1, window=1024, rows=1, top_k=64)
LINK = Link("test", "100 GB/s", 100e9, 1e-5)


def test_a_sum_takes_the_faster_of_two_ways() -> None:
    assert sum_seconds(LINK, 1, 1000) == 0
    assert sum_seconds(LINK, 4, 1000) == pytest.approx(1e-5 + 3000 / 100e9)
    assert sum_seconds(LINK, 4, 10_000_000) == pytest.approx(2 * (1e-5 + 7_500_000 / 100e9))


def test_a_pass_of_34_layers_has_68_sums_and_one_merge() -> None:
    instant = replace(LINK, bandwidth=1e30)
    assert exchange_seconds(CONFIG_8B, ONE, instant, 2) == pytest.approx(69e-5)
    assert exchange_seconds(CONFIG_8B, ONE, instant, 1) == 0
    free = replace(LINK, latency=0.0)
    moved = 68 * 2 * 4096 + (64 * 12 + 4)  # fp16 activations; 64 candidates of 12 bytes and a log-sum-exp
    assert exchange_seconds(CONFIG_8B, ONE, free, 2) == pytest.approx(moved / 100e9)


def test_ranks_read_their_parts_and_the_norms() -> None:
    """A rank reads 1/N of the matrices and the KV rows, and the whole of what every rank holds."""
    matrices = uniform_matrix_bytes(CONFIG_8B, W4A16)
    whole = least_bytes(CONFIG_8B, ONE, matrices)
    divided = matrices + 2 * 2 * 1024 * 34 * 1025  # k and v, fp16, 1024 wide, of the window and the step's row
    for ranks in (2, 4, 8):
        expected = (whole - divided + divided / ranks) / H100.bandwidth
        assert rank_seconds(H100, CONFIG_8B, W4A16, ONE, ranks) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="8 KV heads are not a multiple of 3"):
        rank_seconds(H100, CONFIG_8B, W4A16, ONE, 3)


def test_only_numbers_of_ranks_that_divide_the_kv_heads_are_estimated() -> None:
    config = CONFIG_8B.model_copy(update={"num_key_value_heads": 2})
    assert [one.ranks for one in estimates(H100, LINK, config, W4A16, window=1024)] == [1, 2]


def test_a_link_that_costs_nothing_divides_the_time() -> None:
    free = Link("free", "free", 1e30, 0.0)
    for one in estimates(H100, free, CONFIG_8B, W4A16, window=1024):
        assert one.ar_speedup == pytest.approx(one.ranks, rel=0.01)
        assert one.cycle_speedup == pytest.approx(one.ranks, rel=0.03)  # one of the adapter's matrices is not divided
        assert one.sums == pytest.approx(0)


def test_the_documentation_has_these_figures() -> None:
    arguments = argparse.Namespace(batch=1, window=CONTEXT, weights="w4a16")
    page = (ROOT / "docs/scale-out.md").read_text(encoding="utf-8")
    assert {link for _, link in PAIRS} <= LINKS.keys()
    for gpu, link in PAIRS:
        for row in rows_of(gpu, link, arguments):
            assert "| " + " | ".join(row) + " |" in page
