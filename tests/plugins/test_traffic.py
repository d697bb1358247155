"""The counted traffic equals the interpreter's, tensor by tensor; no kernel moves much more than its least bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from scripts.gpu.kernel_launch import node_of
from scripts.gpu.kernel_table import LIMIT, LONGEST_BOUND_BY_BYTES
from scripts.gpu.kernels_8b import (
    ADAPTER_RANK,
    ATTENTION,
    HIDDEN,
    INTERMEDIATE,
    KV_WIDTH,
    LAYERS,
    PRODUCTS,
    QUERY_WIDTH,
    SPLITS,
    VOCABULARY,
)
from tests.support.kernel_cases import AttentionCase, ProductCase, operator_inputs
from tests.support.kernel_functions import attend, int4_product, kv_write, run
from tests.support.triton_interpreter import Traffic
from trimode.build import roofline
from trimode.build.gpu import kernel_network
from trimode.plugins.operators import (
    OPERATORS,
    PLUGINS,
    Attend,
    Int4Product,
    KvWrite,
    MergeSplits,
    Pattern,
    QkvProduct,
    Tactic,
)
from trimode.plugins.traffic import (
    KernelTraffic,
    attend_traffic,
    int4_product_traffic,
    kv_write_traffic,
    merge_traffic,
    moved_bytes,
    needed_bytes,
    operator_traffic,
    qkv_product_traffic,
)

REAL = 2
# Operators with traffic functions, and tests, of their own.
MEASURED_ALONE = [name for name in PLUGINS if name.startswith(("KvWrite", "Attend", "MergeSplits", "Int4", "Qkv"))]


def assert_same(counted: KernelTraffic, interpreted: dict[str, Traffic]) -> None:
    """Ignores tensors without accesses: the other name of an aliased input."""
    touched = {name: traffic for name, traffic in interpreted.items() if traffic.loaded or traffic.stored}
    assert {name.removesuffix("_out"): (t.loaded, t.stored, t.touched) for name, t in touched.items()} == {
        name: (traffic.loaded, traffic.stored, traffic.needed) for name, traffic in counted.items()
    }


def test_the_sizes_are_the_8b_checkpoints() -> None:
    config = roofline.CONFIG_8B
    assert (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.query_width,
        config.kv_width,
    ) == (LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY, QUERY_WIDTH, KV_WIDTH)
    assert (ATTENTION["head_dim"], ADAPTER_RANK) == (config.head_dim, roofline.ADAPTER_RANK)
    assert kernel_network.SPLITS == SPLITS


def test_kv_write_traffic_equals_the_interpreters() -> None:
    node = KvWrite.node(batch=2, step=4, capacity=10, kv_heads=2, group=4, head_dim=64)
    inputs = {name: torch.zeros(*shape, dtype=torch.float16) for name, shape in node.shapes.items()}
    _, traffic = kv_write(**{**inputs, "write_indices": torch.tensor([3, 0])})
    assert_same(kv_write_traffic(node, REAL), traffic)


@pytest.mark.parametrize("tactic", Attend.TACTICS, ids=lambda tactic: str(tactic.constants["BLOCK_M"]))
@pytest.mark.parametrize("pattern", ["causal", "bidirectional", "masked"])
def test_attention_traffic_equals_the_interpreters(pattern: Pattern, tactic: Tactic) -> None:
    for committed, step, scaled in (((300, 0), 1, True), ((130, 270), 7, False), ((200,), 70, True)):
        case = AttentionCase(
            committed, step, pattern, group=2, kv_heads=2, scaled=scaled, tactic=tactic, dtype=torch.float16
        )
        inputs = {name: tensor.nan_to_num() for name, tensor in case.inputs().items()}
        if pattern == "bidirectional":
            inputs["step_lengths"][:] = step
        if pattern == "masked":
            inputs["block_mask"] = torch.ones(case.batch, step, step).tril().bool()
        _, attended, merged = attend(**inputs, splits=case.splits, tactic=tactic)
        attributes = {"splits": case.splits}
        node = node_of({name: tensor for name, tensor in inputs.items() if name != "output_scale"}, attributes)
        assert_same(attend_traffic(Attend(pattern), node, tactic, committed, REAL), attended)
        sizes = {"kv_heads": case.kv_heads, "group": case.group, "head_dim": case.head_dim, "splits": case.splits}
        node = MergeSplits(output_scale=scaled).node(batch=case.batch, step=step, **sizes)
        assert_same(merge_traffic(node, pattern, committed, REAL), merged)


@pytest.mark.parametrize("tactic", Int4Product.TACTICS, ids=lambda tactic: str(tuple(tactic.constants.values())))
def test_product_traffic_equals_the_interpreters(tactic: Tactic) -> None:
    plain = ProductCase(tactic.constants["BLOCK_M"] + 3, 2, 2 * 97, tactic=tactic, dtype=torch.float16)
    fused = replace(plain, rank=32, residual=True, for_norm=True)
    split = replace(plain, rows=64 if "STEPS" in tactic.constants else 70, groups=16, split=True)
    gated = replace(split, columns=144, rank=0, residual=False, normed=True, gated=True)
    for case in (plain, fused, replace(plain, group=32), replace(plain, group=256), split, gated):
        inputs = case.inputs()
        _, traffic = int4_product(**inputs, tactic=case.tactic, gated=case.gated)
        assert_same(int4_product_traffic(case.operator, node_of(inputs), case.tactic, REAL), traffic)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tactic", QkvProduct.TACTICS, ids=lambda tactic: str(tuple(tactic.constants.values())))
def test_qkv_traffic_equals_the_interpreters(tactic: Tactic, split: bool) -> None:
    operator = QkvProduct(split=split, normed=True)
    sizes = {"kv_heads": 1, "group": 2, "head_dim": 64}
    node = operator.qkv_node(batch=2, step=9, capacity=12, inner=2048 if split else 256, **sizes)
    inputs = {name: torch.zeros(*shape, dtype=torch.float16) for name, shape in node.shapes.items()}
    for name, dtype in (("packed", torch.int32), ("counters", torch.int32), ("write_indices", torch.int64)):
        if name in inputs:
            inputs[name] = inputs[name].to(dtype)
    inputs |= {name: inputs[name].float() + 1 for name in ("scale", "squares", "epsilon")}
    inputs["write_indices"] += torch.tensor([3, 0])
    _, traffic = run(operator, inputs, tactic=tactic)
    assert_same(qkv_product_traffic(operator, node, tactic, REAL), traffic)


@pytest.mark.parametrize("name", [name for name in PLUGINS if name not in MEASURED_ALONE])
def test_the_other_operators_traffic_equals_the_interpreters(name: str) -> None:
    """Every tactic. Indices differ and positions are small, as the counts assume."""
    operator = OPERATORS[name]
    inputs, attributes = operator_inputs(name, torch.float16)
    for tactic in operator.tactics(node_of(inputs, attributes)).values():
        _, traffic = run(operator, inputs, tactic=tactic, real=torch.float16, **attributes)
        assert_same(operator_traffic(operator, node_of(inputs, attributes), tactic, REAL), traffic)


@pytest.mark.parametrize("step", [1, 8, 32, 33, 48, 64])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_no_kernel_moves_more_than_a_tenth_above_its_least_bytes(group: int, batch: int, step: int) -> None:
    """The 8B checkpoint's shapes with several groups; each kernel with the tactic that moves least."""

    def least(found: list[KernelTraffic]) -> float:
        return min(moved_bytes(traffic) / needed_bytes(traffic) for traffic in found)

    sizes = {**ATTENTION, "batch": batch, "step": step, "group": group}
    assert least([kv_write_traffic(KvWrite.node(capacity=step, **sizes), REAL)]) <= LIMIT
    for window in (512, 4096, 32768):
        for pattern in get_args(Pattern):
            operator = Attend(pattern)
            node = operator.node(capacity=window + step, splits=SPLITS, **sizes)
            found = [attend_traffic(operator, node, t, [window] * batch, REAL) for t in Attend.TACTICS]
            assert least(found) <= LIMIT
            merge = MergeSplits().node(splits=SPLITS, **sizes)
            assert least([merge_traffic(merge, pattern, [window] * batch, REAL)]) <= LIMIT
    rows = batch * step
    for product in PRODUCTS.values() if rows <= LONGEST_BOUND_BY_BYTES else ():
        node = product.node(rows)
        found = [int4_product_traffic(product.operator, node, t, REAL) for t in product.operator.tactics(node).values()]
        assert least(found) <= LIMIT


def test_rows_shared_by_neighbours_count_once_if_the_cache_holds_them() -> None:
    """Two tiles of a step: K and V of a split pass through memory once if they have at most 2 MiB, else twice."""
    operator = Attend("bidirectional")
    nodes = (operator.node(batch=1, step=64, capacity=32832, splits=splits, **ATTENTION) for splits in (16, 4))
    short, long = (attend_traffic(operator, node, Attend.TACTICS[1], [32768], REAL) for node in nodes)
    for name in ("k_cache", "v_cache"):
        assert short[name].moved == short[name].needed == short[name].loaded // 2
        assert long[name].moved == long[name].loaded == 2 * long[name].needed
