"""The benchmark without a GPU: every part over the driver double, its limits, and its report."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from scripts.gpu.bench import LIMITS, faults
from scripts.gpu.bench_parts import prefill_flops
from scripts.gpu.bench_report import markdown
from scripts.gpu.dry_run import dry_bench
from trimode.build.roofline import CONFIG_8B

MINUTES = 6


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return dry_bench(LIMITS)


def test_all_parts_together_take_at_most_six_minutes() -> None:
    assert sum(LIMITS.values()) <= 60 * MINUTES


def test_every_part_has_records_and_no_fault(report: dict[str, Any]) -> None:
    assert report["records"].keys() == LIMITS.keys()
    assert all(report["records"].values())
    assert faults(report) == []


def test_the_report_shows_every_part(report: dict[str, Any]) -> None:
    measured = copy.deepcopy(report)
    measured["records"]["device"] = [{"card": "H", "copy_bandwidth": 2e12, "read_bandwidth": 3e12, "bf16_peak": 8e14}]
    for record in (*measured["records"]["products"], *measured["records"]["variants"]):
        record["microseconds"] = 10.0
    text = markdown(measured)
    for title in (
        "Products",
        "Variants",
        "Passes",
        "Kernels of a pass",
        "Bits",
        "Prefill",
        "Requests at the same time",
    ):
        table = text.split(f"## {title}\n\n")[1].split("\n\n")[0]
        assert len(table.splitlines()) > 2, title
    assert "copy bandwidth: 2.00 TB/s" in text
    assert "auto" in text
    assert "nan" not in text


def test_wrong_products_and_different_bits_are_faults(report: dict[str, Any]) -> None:
    broken = copy.deepcopy(report)
    broken["records"]["products"][0]["right"] = False
    broken["records"]["bits"][0]["equal"] -= 1
    assert len(faults(broken)) == 2


def test_a_prefills_operations_are_those_of_its_matrices_and_of_attention() -> None:
    """The 8B checkpoint has 6.95e9 weights in its layers; a token attends to half of 2,048 rows."""
    matrices = 2 * 34 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) * 2048
    assert prefill_flops(CONFIG_8B, 2048) == matrices + 34 * 4 * 2048 * 1024 * 4096
