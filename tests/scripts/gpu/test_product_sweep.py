"""The sweep over variants of the int4 product, without a GPU."""

from __future__ import annotations

from scripts.gpu.kernel_launch import KernelLaunch
from scripts.gpu.product_sweep import SIZES_8B, SMALL_SIZES, SweepSizes, markdown, results, suits
from tests.support.interpreter_host import InterpreterHost
from trimode.plugins.operators.int4_product import unit_of

FEW = SweepSizes(SMALL_SIZES.matrices, (1,))


def test_every_variant_is_right() -> None:
    records = list(results(InterpreterHost(), SMALL_SIZES))
    assert {record["splits"] for record in records} == {1, 2}
    assert all(record["right"] for record in records)


def test_a_variant_that_writes_nothing_is_wrong() -> None:
    class Idle(InterpreterHost):
        def launch(self, kernel: str, launched: KernelLaunch) -> None:
            pass

    records = list(results(Idle(), FEW))
    assert records
    assert not any(record["right"] for record in records)


def test_a_kernel_that_the_gpu_lacks_is_not_launched() -> None:
    assert not list(results(InterpreterHost(), FEW, kernels=()))


def test_the_operators_own_choice_is_a_variant_of_every_case() -> None:
    for matrix in SIZES_8B.matrices.values():
        for rows in SIZES_8B.rows:
            node = matrix.product.node(rows)
            tactics = matrix.product.operator.tactics(node)
            default = tactics[matrix.product.operator.default_tactic(node, tactics)]
            own = next(variant for variant in matrix.variants() if variant.splits == matrix.own_splits)
            assert any(tactic == default and suits(tactic, rows) for tactic in own.tactics(node).values())


def test_parts_are_whole_units() -> None:
    for matrix in SIZES_8B.matrices.values():
        for variant in matrix.variants():
            assert matrix.inner % (unit_of(128) * variant.splits) == 0


def test_the_table_shows_the_default_and_the_fastest() -> None:
    record = {"matrix": "o", "rows": 1, "splits": 4, "BLOCK_M": 16, "BLOCK_N": 64, "warps": 4, "stages": 3}
    slow = {**record, "right": True, "default": True, "microseconds": 9.0}
    fast = {**record, "splits": 8, "right": False, "default": False, "microseconds": 7.0}
    _, _, first, second, *_ = markdown([slow, fast]).splitlines()
    assert first == "| o | 1 | 4 parts, 16 x 64, 4 warps, 3 stages (default) | 9.0 |"
    assert second == "| o | 1 | 8 parts, 16 x 64, 4 warps, 3 stages **wrong** | 7.0 |"
