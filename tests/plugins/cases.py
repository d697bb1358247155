"""Random inputs of the kernels: a few integers say what a case is, a seed fills it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from trimode.plugins.contracts import ATTEND_TACTICS, INT4_PRODUCT_TACTICS, Pattern, Tactic

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The interpreter's time goes by tiles, whatever their size: cases of many rows have larger ones than any GPU would.
WIDE = Tactic({"BLOCK_M": 64, "BLOCK_N": 512, "BLOCK_S": 64, "MIN_ROWS": 256}, warps=8, stages=1)
FEW_ROWS, ROWS = 600, 10000


@dataclass(frozen=True)
class AttentionCase:
    """``committed`` has an entry a sequence. slack: rows of the pool behind the longest sequence."""

    committed: tuple[int, ...]
    step: int
    pattern: Pattern
    group: int
    kv_heads: int = 1
    head_dim: int = 64
    splits: int = 4
    slack: int = 3
    tactic: Tactic = ATTEND_TACTICS[0]
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def batch(self) -> int:
        return len(self.committed)

    @property
    def capacity(self) -> int:
        return max(self.committed) + self.step + self.slack

    def inputs(self) -> dict[str, Tensor]:
        """Of :func:`trimode.plugins.attention.attend`. Rows of the pool that hold nothing yet are NaN."""
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(self.dtype)

        pool = (self.batch, self.kv_heads, self.capacity, self.head_dim)
        write_indices = torch.tensor(self.committed)
        inputs = {
            "q": normal(self.batch, self.kv_heads * self.group, self.step, self.head_dim) / 4,
            "k_cache": normal(*pool),
            "v_cache": normal(*pool),
            "write_indices": write_indices,
        }
        written = write_indices + self.step
        if self.pattern == "bidirectional":
            real = torch.randint(0, self.step + 1, (self.batch,), generator=random)
            inputs["step_lengths"] = real
            written = write_indices + real
        if self.pattern == "masked":
            tree = torch.rand(self.batch, self.step, self.step, generator=random) < 0.5
            inputs["block_mask"] = tree | torch.eye(self.step, dtype=torch.bool)
        empty = torch.arange(self.capacity) >= written[:, None]
        for name in ("k_cache", "v_cache"):
            inputs[name].masked_fill_(empty[:, None, :, None], float("nan"))
        return inputs


@st.composite
def attention_cases(draw: Any) -> AttentionCase:
    batch = draw(st.integers(1, 8))
    tactic = draw(st.sampled_from([*ATTEND_TACTICS, WIDE]))
    longest = min(5000, (ROWS if tactic is WIDE else FEW_ROWS) // batch)
    group = draw(st.sampled_from([1, 4, 8]))
    tokens = max(1, min(64, 128 // batch, 3 * tactic.constants["BLOCK_M"] // group))
    return AttentionCase(
        committed=tuple(draw(st.lists(st.integers(0, longest), min_size=batch, max_size=batch))),
        step=draw(st.integers(1, tokens)),
        pattern=draw(st.sampled_from(["causal", "bidirectional", "masked"])),
        group=group,
        kv_heads=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([64, 128])),
        splits=draw(st.integers(1, 6)),
        slack=draw(st.integers(0, 70)),
        tactic=tactic,
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
    )


@dataclass(frozen=True)
class ProductCase:
    """x [rows, groups * group] times a matrix of ``columns``; rank 0: no adapter."""

    rows: int
    groups: int
    columns: int
    group: int = 128
    input_scale: bool = False
    rank: int = 0
    residual: bool = False
    tactic: Tactic = INT4_PRODUCT_TACTICS[2]
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def inputs(self) -> dict[str, Tensor]:
        """Of :func:`trimode.plugins.int4_product.int4_product`."""
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(self.dtype)

        inner = self.groups * self.group
        packed = torch.randint(-128, 128, (inner, self.columns // 2), generator=random, dtype=torch.int8)
        inputs = {"x": normal(self.rows, inner), "packed": packed, "scale": normal(self.groups, self.columns)}
        if self.input_scale:
            inputs["input_scale"] = normal(inner)
        if self.rank:
            # As large as the product itself, so that its lack shows.
            inputs["narrow"] = normal(self.rows, self.rank) * inner**0.5
            inputs["adapter_up"] = normal(self.rank, self.columns) * 4
        if self.residual:
            inputs["residual"] = normal(self.rows, self.columns) * inner**0.5 * 4
        return inputs


@st.composite
def product_cases(draw: Any) -> ProductCase:
    tactic = draw(st.sampled_from(INT4_PRODUCT_TACTICS))
    return ProductCase(
        rows=draw(st.integers(1, 64)) if tactic.constants["BLOCK_M"] >= 16 else draw(st.integers(1, 6)),
        groups=draw(st.integers(1, 5)),
        columns=2 * draw(st.integers(1, 150)),
        group=draw(st.sampled_from([64, 128])) if tactic.constants["BLOCK_K"] <= 64 else 128,
        input_scale=draw(st.booleans()),
        rank=draw(st.sampled_from([0, 8, 24, 64])),
        residual=draw(st.booleans()),
        tactic=tactic,
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
    )
