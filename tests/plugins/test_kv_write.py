"""The KV write, interpreted, against the reference; and the reference against the network's own rotation."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.interpreted import BARS, distance, kv_write
from tests.support.kernel_cases import DTYPES
from trimode.model.reference.network import rotate
from trimode.plugins import kv_write as reference


def inputs(
    firsts: list[int], step: int, group: int, kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    batch = len(firsts)
    qkv = torch.randn(batch, step, (group + 2) * kv_heads * head_dim, generator=random).to(dtype)
    tables = [torch.randn(batch, step, head_dim // 2, generator=random).to(dtype) for _ in range(4)]
    caches = [torch.randn(batch, kv_heads, capacity, head_dim, generator=random).to(dtype) for _ in range(2)]
    return [qkv, *tables, torch.tensor(firsts), *caches]


@st.composite
def steps(draw: Any) -> tuple[list[int], int]:
    """First rows and the step's length: a program is a token, and there are 64 at most."""
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
def test_the_write_is_the_reference(
    steps: tuple[list[int], int], group: int, kv_heads: int, head_dim: int, slack: int, dtype: torch.dtype
) -> None:
    """Rows of the step are the reference's; all other rows of the pool are as they were, to the bit."""
    firsts, step = steps
    given_ = inputs(firsts, step, group, kv_heads, head_dim, max(firsts) + step + slack, dtype)
    expected_caches = [cache.clone() for cache in given_[-2:]]
    expected = reference.kv_write(*given_[:-2], *expected_caches)
    before = [cache.clone() for cache in given_[-2:]]
    found, _ = kv_write(*given_)
    assert distance(found, expected) <= BARS[dtype]
    row = torch.arange(given_[-1].shape[2])
    for sequence, first in enumerate(firsts):
        written = (row >= first) & (row < first + step)
        for cache, then, wanted in zip(given_[-2:], before, expected_caches, strict=True):
            assert distance(cache[sequence, :, written], wanted[sequence, :, written]) <= BARS[dtype]
            assert torch.equal(cache[sequence, :, ~written], then[sequence, :, ~written])


def test_rows_past_the_pools_end_are_not_written() -> None:
    given_ = inputs([6], 4, 4, 2, 64, 8, torch.float32)
    before = given_[-1].clone()
    found, _ = kv_write(*given_)
    assert not found.isnan().any()
    assert torch.equal(given_[-1][:, :, :6], before[:, :, :6])
    values = given_[0][0, :2, -2 * 64 :].unflatten(-1, (2, 64)).transpose(0, 1)
    assert torch.equal(given_[-1][0, :, 6:], values)


def test_the_reference_rotates_as_the_network_does() -> None:
    qkv, *tables, firsts, k_cache, v_cache = inputs([3], 5, 4, 2, 64, 9, torch.float32)
    q = reference.kv_write(qkv, *tables, firsts, k_cache, v_cache)
    query_cos, query_sin, key_cos, key_sin = (torch.cat((table, table), -1)[:, None] for table in tables)
    heads = qkv.unflatten(-1, (-1, 64)).transpose(1, 2)
    assert distance(q, rotate(heads[:, :8], query_cos, query_sin)) < 1e-6
    assert distance(k_cache[:, :, 3:8], rotate(heads[:, 8:10], key_cos, key_sin)) < 1e-6
    assert torch.equal(v_cache[:, :, 3:8], heads[:, 10:])
