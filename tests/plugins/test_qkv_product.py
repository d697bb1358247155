"""The product of queries, keys and values, interpreted, against the reference; its order of columns; its bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scripts.gpu.kernel_checks import distance
from scripts.gpu.kernel_launch import prepare
from tests.support.kernel_cases import DTYPES
from tests.support.kernel_functions import TOLERANCES, launch
from trimode.build.graph.int4_tiles import pack_tiles, pair_rows
from trimode.plugins.operators import Node, QkvProduct, Tactic
from trimode.plugins.operators.int4_product import SPLIT_ROWS
from trimode.plugins.reference import kv_write
from trimode.plugins.reference import qkv_product as reference

CACHES = ("k_cache", "v_cache")


@dataclass(frozen=True)
class QkvCase:
    """firsts: the ``write_indices``. groups: of rows of W."""

    firsts: tuple[int, ...]
    step: int
    groups: int = 2
    weight_group: int = 32
    kv_heads: int = 1
    group: int = 2
    head_dim: int = 64
    split: bool = False
    normed: bool = False
    slack: int = 2
    tactic: Tactic = QkvProduct.TACTICS[0]
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def operator(self) -> QkvProduct:
        return QkvProduct(split=self.split, normed=self.normed)

    @property
    def node(self) -> Node:
        return self.operator.qkv_node(
            batch=len(self.firsts),
            step=self.step,
            capacity=max(self.firsts) + self.step + self.slack,
            inner=self.groups * self.weight_group,
            kv_heads=self.kv_heads,
            group=self.group,
            head_dim=self.head_dim,
            weight_group=self.weight_group,
        )

    def inputs(self) -> dict[str, Tensor]:
        random, inputs = torch.Generator().manual_seed(self.seed), {}
        for name, shape in self.node.shapes.items():
            if name == "packed":
                inputs[name] = torch.randint(-(2**31), 2**31, shape, generator=random, dtype=torch.int32)
            elif name == "counters":
                inputs[name] = torch.zeros(shape, dtype=torch.int32)
            elif name == "write_indices":
                inputs[name] = torch.tensor(self.firsts)
            else:
                values = torch.randn(shape, generator=random)
                inputs[name] = values if name in ("scale", "squares", "epsilon") else values.to(self.dtype)
        if self.normed:
            # Of a stream whose rows differ in size, so that a missing norm exceeds the tolerance.
            tokens = inputs["squares"].shape[1]
            inputs["squares"] = 64 * inputs["squares"].square() * torch.arange(1, tokens + 1)
            inputs["epsilon"] = torch.tensor([0.1])
        return inputs


def run(case: QkvCase, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The queries and both caches, which are copied first."""
    given = {**inputs, **{name: inputs[name].clone() for name in CACHES}}
    launched = prepare(case.operator, given, case.tactic)
    launch(launched)
    return launched.outputs[0], given["k_cache"], given["v_cache"]


def expected(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    given = {name: tensor.clone() for name, tensor in inputs.items() if name != "counters"}
    return reference.qkv_product(**given), given["k_cache"], given["v_cache"]


def qkv_distance(case: QkvCase) -> float:
    """Of the queries and of both pools, of which all rows but the step's must keep their bits."""
    inputs = case.inputs()
    return max(distance(*pair) for pair in zip(run(case, inputs), expected(inputs), strict=True))


@st.composite
def cases(draw: Any) -> QkvCase:
    firsts = tuple(draw(st.lists(st.integers(0, 300), min_size=1, max_size=4)))
    case = QkvCase(
        firsts=firsts,
        step=draw(st.integers(1, 72 // len(firsts))),
        groups=draw(st.integers(1, 4)),
        weight_group=draw(st.sampled_from([16, 32, 48, 128])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 3, 4])),
        head_dim=draw(st.sampled_from([32, 64, 128])),
        normed=draw(st.booleans()),
        slack=draw(st.integers(0, 3)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
    )
    if draw(st.integers(0, 3)) == 0:
        case = replace(case, groups=16, weight_group=128, kv_heads=1, split=True)
    return replace(case, tactic=draw(st.sampled_from(list(case.operator.tactics(case.node).values()))))


@given(cases())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_product_equals_the_reference(case: QkvCase) -> None:
    assert qkv_distance(case) <= TOLERANCES[case.dtype]


@pytest.mark.parametrize(
    "tactic", QkvProduct.TACTICS, ids=lambda t: "x".join(map(str, (*t.constants.values(), t.warps)))
)
def test_every_tactic_writes_the_steps_rows_only(tactic: Tactic) -> None:
    """With one row more than a tile, spread over two sequences."""
    case = QkvCase((5, 2), tactic.constants["BLOCK_M"] // 2 + 1, kv_heads=2, tactic=tactic, dtype=torch.float16)
    inputs = case.inputs()
    q, *caches = run(case, inputs)
    assert not q.isnan().any()
    rows = torch.arange(caches[0].shape[2])
    for name, cache in zip(CACHES, caches, strict=True):
        for sequence, first in enumerate(case.firsts):
            others = (rows < first) | (rows >= first + case.step)
            assert torch.equal(cache[sequence][:, others], inputs[name][sequence][:, others])
            assert not torch.equal(cache[sequence][:, ~others], inputs[name][sequence][:, ~others])
    assert qkv_distance(case) <= TOLERANCES[case.dtype]


def test_rows_past_the_end_of_the_pool_are_not_written() -> None:
    """The pool ends two rows after the step's first one. The interpreter refuses other memory."""
    case = QkvCase((6,), 4, slack=0)
    inputs = case.inputs()
    whole = run(case, inputs)
    short = {**inputs, **{name: inputs[name][:, :, :8].contiguous() for name in CACHES}}
    q, *caches = run(case, short)
    assert torch.equal(q, whole[0])
    for cache, full in zip(caches, whole[1:], strict=True):
        assert torch.equal(cache, full[:, :, :8])


def test_pairs_are_the_columns_of_the_checkpoints_heads() -> None:
    """From matrices of q, k and v to rotated heads, through the layout of the pool."""
    case = QkvCase((3,), 5, kv_heads=2, group=3, head_dim=32)
    inputs, generator = case.inputs(), np.random.default_rng(0)
    groups, columns = inputs["scale"].shape
    integers = generator.integers(-8, 8, (columns, 32 * groups)).astype(np.int8)
    scale = generator.uniform(0.01, 0.02, (columns, groups)).astype(np.float32)
    qkv = inputs["x"] @ torch.from_numpy(integers * scale.repeat(32, 1)).T.float()
    inputs["packed"] = torch.from_numpy(pack_tiles(pair_rows(integers, 16), 32))
    inputs["scale"] = torch.from_numpy(pair_rows(scale, 16).T.copy())
    wanted = {name: inputs[name].clone() for name in CACHES}
    others = {name: inputs[name] for name in ("query_cos", "query_sin", "key_cos", "key_sin", "write_indices")}
    q = kv_write.kv_write(qkv, **others, **wanted)
    found, k_cache, v_cache = run(case, inputs)
    assert distance(found, q) < TOLERANCES[torch.float32]
    assert distance(k_cache, wanted["k_cache"]) < TOLERANCES[torch.float32]
    assert distance(v_cache, wanted["v_cache"]) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("split", [False, True], ids=["one program", "separate programs"])
def test_a_rows_bits_depend_neither_on_other_rows_nor_on_the_tile(split: bool) -> None:
    """Steps of 1, 8 and 64 tokens in every tactic, and the rows of a batch."""
    case = QkvCase(
        (0,), SPLIT_ROWS + 6, groups=16, weight_group=128, kv_heads=1, group=2, split=split, dtype=torch.bfloat16
    )
    case = replace(case, normed=True)
    inputs = case.inputs()
    tokens = ("x", "query_cos", "query_sin", "key_cos", "key_sin")
    *_, chunk = case.operator.tactics(case.node).values()
    wanted = run(replace(case, tactic=chunk), inputs)
    for first, step in ((69, 1), (3, 8), (5, 64)):
        for tactic in case.operator.tactics(replace(case, step=step).node).values():
            given_ = {**inputs, "write_indices": torch.tensor([first])}
            given_ |= {name: inputs[name][:, first : first + step].contiguous() for name in tokens}
            given_["squares"] = inputs["squares"][:, first : first + step].contiguous()
            rows = slice(first, first + step)
            q, k, v = run(replace(case, tactic=tactic), given_)
            assert torch.equal(q, wanted[0][:, :, rows]), (tactic, first, step)
            assert torch.equal(k[:, :, rows], wanted[1][:, :, rows])
            assert torch.equal(v[:, :, rows], wanted[2][:, :, rows])
