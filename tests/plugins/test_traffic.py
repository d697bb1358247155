"""The counts of what kernels move are the interpreter's, tensor by tensor; and no kernel moves much above its floor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.plugins.cases import AttentionCase, ProductCase
from tests.plugins.interpreted import attend, int4_product, kv_write
from trimode.build.roofline import CONFIG_8B
from trimode.plugins.contracts import (
    ATTEND_TACTICS,
    INT4_PRODUCT_TACTICS,
    AttentionShape,
    Pattern,
    ProductShape,
    Tactic,
)
from trimode.plugins.interpretation import Traffic
from trimode.plugins.traffic import (
    Asked,
    attend_traffic,
    int4_product_traffic,
    kv_write_traffic,
    merge_traffic,
    moved_bytes,
    needed_bytes,
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
    for case in (plain, replace(plain, input_scale=True, rank=32, residual=True)):
        _, traffic = int4_product(**case.inputs(), tactic=tactic)
        shape = ProductShape(256, case.columns, 128, case.input_scale, case.rank, case.residual)
        same(int4_product_traffic(shape, tactic, case.rows, REAL), traffic)


ATTENTION = AttentionShape(CONFIG_8B.num_key_value_heads, 4, CONFIG_8B.head_dim, splits=16)


@pytest.mark.parametrize("step", [1, 8, 32])
def test_no_kernel_moves_more_than_a_tenth_above_its_floor(step: int) -> None:
    """The 8B checkpoint's shapes, each kernel with the tactic that moves least."""

    def least(found: list[dict[str, Asked]]) -> float:
        return min(moved_bytes(asked) / needed_bytes(asked) for asked in found)

    assert least([kv_write_traffic(ATTENTION, 1, step, REAL)]) <= 1.1
    for window in (512, 4096, 32768):
        for pattern in ("bidirectional", "masked"):
            found = [attend_traffic(ATTENTION, t, pattern, [window], step, REAL) for t in ATTEND_TACTICS]
            assert least(found) <= 1.1
            assert least([merge_traffic(ATTENTION, asked, 1, step, REAL) for asked in found]) <= 1.1
    hidden, inner = CONFIG_8B.hidden_size, CONFIG_8B.intermediate_size
    for shape in (
        ProductShape(hidden, CONFIG_8B.query_width + 2 * CONFIG_8B.kv_width),
        ProductShape(hidden, hidden, rank=128, residual=True),
        ProductShape(hidden, 2 * inner),
        ProductShape(inner, hidden, residual=True),
    ):
        assert least([int4_product_traffic(shape, t, step, REAL) for t in INT4_PRODUCT_TACTICS]) <= 1.1
