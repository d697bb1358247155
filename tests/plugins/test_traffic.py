"""The counts of what kernels move are the interpreter's, tensor by tensor; and no kernel moves much above its floor."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from scripts.gpu.kernel_table import LONGEST_HELD, PRODUCTS_8B
from scripts.gpu.traffic import (
    Asked,
    attend_traffic,
    int4_product_traffic,
    kv_write_traffic,
    merge_traffic,
    moved_bytes,
    needed_bytes,
)
from tests.support.interpretation import Traffic
from tests.support.interpreted import attend, int4_product, kv_write
from tests.support.kernel_cases import AttentionCase, ProductCase
from trimode.build.audit.roofline import CONFIG_8B
from trimode.plugins.contracts import (
    ATTEND_TACTICS,
    INT4_PRODUCT_TACTICS,
    AttentionShape,
    Pattern,
    ProductShape,
    Tactic,
    within_group,
)

REAL = 2


def same(counted: dict[str, Asked], interpreted: dict[str, Traffic]) -> None:
    """Tensors that nothing touches (an aliased input by its other name) aside."""
    touched = {name: traffic for name, traffic in interpreted.items() if traffic.loaded or traffic.stored}
    assert {name.removesuffix("_out"): (t.loaded, t.stored, t.touched) for name, t in touched.items()} == {
        name: (asked.loaded, asked.stored, asked.needed) for name, asked in counted.items()
    }


def test_the_kv_writes_count_is_the_interpreters() -> None:
    case = AttentionCase((3, 0), 4, "causal", group=4, kv_heads=2, dtype=torch.float16)
    tables = [torch.zeros(case.batch, case.step, case.head_dim // 2, dtype=case.dtype) for _ in range(4)]
    qkv = torch.zeros(case.batch, case.step, 12 * case.head_dim, dtype=case.dtype)
    inputs = case.inputs()
    _, traffic = kv_write(qkv, *tables, inputs["write_indices"], inputs["k_cache"], inputs["v_cache"])
    same(kv_write_traffic(AttentionShape(2, 4, case.head_dim, 1), case.batch, case.step, REAL), traffic)


@pytest.mark.parametrize("tactic", ATTEND_TACTICS[:2], ids=["16", "64"])
@pytest.mark.parametrize("pattern", ["causal", "bidirectional", "masked"])
def test_attentions_counts_are_the_interpreters(pattern: Pattern, tactic: Tactic) -> None:
    for committed, step in (((700, 0), 1), ((130, 517), 7), ((300,), 70)):
        case = AttentionCase(committed, step, pattern, group=2, kv_heads=2, tactic=tactic, dtype=torch.float16)
        inputs = {name: tensor.nan_to_num() for name, tensor in case.inputs().items()}
        if pattern == "bidirectional":
            inputs["step_lengths"][:] = step
        if pattern == "masked":
            inputs["block_mask"] = torch.ones(case.batch, step, step).tril().bool()
        _, attended, merged = attend(**inputs, splits=case.splits, tactic=tactic)
        shape = AttentionShape(case.kv_heads, case.group, case.head_dim, case.splits)
        counted = attend_traffic(shape, tactic, pattern, committed, step, REAL)
        same(counted, attended)
        same(merge_traffic(shape, counted, case.batch, step, REAL), merged)


@pytest.mark.parametrize("tactic", INT4_PRODUCT_TACTICS, ids=lambda tactic: str(tactic.constants["BLOCK_M"]))
def test_the_products_count_is_the_interpreters(tactic: Tactic) -> None:
    plain = ProductCase(tactic.constants["BLOCK_M"] + 3, 2, 2 * 97, tactic=tactic, dtype=torch.float16)
    fused = replace(plain, input_scale=True, rank=32, residual=True)
    for case in (plain, fused, replace(plain, group=32, tactic=within_group(tactic, 32))):
        _, traffic = int4_product(**case.inputs(), tactic=case.tactic)
        inner = case.groups * case.group
        shape = ProductShape(inner, case.columns, case.group, case.input_scale, case.rank, case.residual)
        same(int4_product_traffic(shape, case.tactic, case.rows, REAL), traffic)


@pytest.mark.parametrize("step", [1, 8, 32, 33, 48, 64])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_no_kernel_moves_more_than_a_tenth_above_its_floor(group: int, batch: int, step: int) -> None:
    """The 8B checkpoint's shapes, its group aside; each kernel with the tactic that moves least."""

    def least(found: list[dict[str, Asked]]) -> float:
        return min(moved_bytes(asked) / needed_bytes(asked) for asked in found)

    attention = AttentionShape(CONFIG_8B.num_key_value_heads, group, CONFIG_8B.head_dim, splits=16)
    assert least([kv_write_traffic(attention, batch, step, REAL)]) <= 1.1
    for window in (512, 4096, 32768):
        for pattern in get_args(Pattern):
            found = [attend_traffic(attention, t, pattern, [window] * batch, step, REAL) for t in ATTEND_TACTICS]
            assert least(found) <= 1.1
            assert least([merge_traffic(attention, asked, batch, step, REAL) for asked in found]) <= 1.1
    rows = batch * step
    for shape in PRODUCTS_8B.values() if rows <= LONGEST_HELD else ():
        assert least([int4_product_traffic(shape, t, rows, REAL) for t in INT4_PRODUCT_TACTICS]) <= 1.1


def test_what_neighbours_share_counts_once_where_the_cache_holds_it() -> None:
    """Two tiles of a step: K and V of a split pass through memory once while a split's are of 2 MiB, else twice."""
    short, long = (
        attend_traffic(AttentionShape(8, 4, 128, splits), ATTEND_TACTICS[2], "bidirectional", [32768], 64, REAL)
        for splits in (16, 4)
    )
    for name in ("k_cache", "v_cache"):
        assert short[name].moved == short[name].needed == short[name].loaded // 2
        assert long[name].moved == long[name].loaded == 2 * long[name].needed
