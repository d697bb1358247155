"""The KV write, interpreted, against the reference; the reference against the network's own rotation."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.gpu.kernel_checks import distance
from tests.support.kernel_cases import DTYPES
from tests.support.kernel_functions import TOLERANCES, kv_write
from trimode.model.reference.network import rotate
from trimode.plugins.operators import KvWrite
from trimode.plugins.reference import kv_write as reference

CACHES = ("k_cache", "v_cache")


def inputs(
    firsts: list[int], step: int, group: int, kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Random inputs of the operator; ``firsts`` are its ``write_indices``."""
    random = torch.Generator().manual_seed(0)
    node = KvWrite.node(
        batch=len(firsts), step=step, capacity=capacity, kv_heads=kv_heads, group=group, head_dim=head_dim
    )
    found = {name: torch.randn(*shape, generator=random).to(dtype) for name, shape in node.shapes.items()}
    return {**found, "write_indices": torch.tensor(firsts)}


@st.composite
def steps(draw: Any) -> tuple[list[int], int]:
    """First rows and the step's length; at most 64 tokens, since the interpreter takes time for each."""
    firsts = draw(st.lists(st.integers(0, 5000), min_size=1, max_size=8))
    return firsts, draw(st.integers(1, 64 // len(firsts)))


@given(
    steps(),
    st.sampled_from([1, 3, 4, 8]),
    st.integers(1, 3),
    st.sampled_from([64, 128]),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_the_write_equals_the_reference(
    steps: tuple[list[int], int], group: int, kv_heads: int, head_dim: int, slack: int, dtype: torch.dtype
) -> None:
    """The step's rows equal the reference's; all other rows of the pool keep their bits."""
    firsts, step = steps
    given_ = inputs(firsts, step, group, kv_heads, head_dim, max(firsts) + step + slack, dtype)
    before = {name: given_[name].clone() for name in CACHES}
    wanted = {**given_, **{name: given_[name].clone() for name in CACHES}}
    expected = reference.kv_write(**wanted)
    found, _ = kv_write(**given_)
    assert distance(found, expected) <= TOLERANCES[dtype]
    row = torch.arange(given_["k_cache"].shape[2])
    for sequence, first in enumerate(firsts):
        written = (row >= first) & (row < first + step)
        for name in CACHES:
            rows = given_[name][sequence]
            assert distance(rows[:, written], wanted[name][sequence][:, written]) <= TOLERANCES[dtype]
            assert torch.equal(rows[:, ~written], before[name][sequence][:, ~written])


def test_rows_past_the_end_of_the_pool_are_not_written() -> None:
    given_ = inputs([6], 4, 4, 2, 64, 8, torch.float32)
    before = given_["v_cache"].clone()
    found, _ = kv_write(**given_)
    assert not found.isnan().any()
    assert torch.equal(given_["v_cache"][:, :, :6], before[:, :, :6])
    values = given_["qkv"][0, :2, -2 * 64 :].unflatten(-1, (2, 64)).transpose(0, 1)
    assert torch.equal(given_["v_cache"][0, :, 6:], values)


def test_the_reference_rotates_as_the_network_does() -> None:
    given_ = inputs([3], 5, 4, 2, 64, 9, torch.float32)
    q = reference.kv_write(**given_)
    tables = (given_[name] for name in ("query_cos", "query_sin", "key_cos", "key_sin"))
    query_cos, query_sin, key_cos, key_sin = (torch.cat((table, table), -1)[:, None] for table in tables)
    heads = given_["qkv"].unflatten(-1, (-1, 64)).transpose(1, 2)
    assert distance(q, rotate(heads[:, :8], query_cos, query_sin)) < 1e-6
    assert distance(given_["k_cache"][:, :, 3:8], rotate(heads[:, 8:10], key_cos, key_sin)) < 1e-6
    assert torch.equal(given_["v_cache"][:, :, 3:8], heads[:, 10:])
