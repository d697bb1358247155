"""Random inputs of the kernels. A case is a few integers and a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from trimode.plugins.operators import (
    OPERATORS,
    Attend,
    DenseProduct,
    Head,
    Int4Head,
    Int4Product,
    Node,
    Pattern,
    Tactic,
)
from trimode.plugins.operators.candidates import TILE
from trimode.plugins.operators.int4_product import SPLIT_ROWS
from trimode.plugins.reference.head_product import tiles_of_logits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = (1, 4, 8)
HEAD_MASK_TOKEN = 9


@dataclass(frozen=True)
class AttentionCase:
    """committed: rows of each sequence before the step. slack: rows of the pool after the longest sequence. scaled:
    with an output scale.
    """

    committed: tuple[int, ...]
    step: int
    pattern: Pattern
    group: int
    kv_heads: int = 1
    head_dim: int = 64
    splits: int = 4
    slack: int = 3
    scaled: bool = False
    tactic: Tactic = Attend.TACTICS[0]
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def batch(self) -> int:
        return len(self.committed)

    @property
    def capacity(self) -> int:
        return max(self.committed) + self.step + self.slack

    def inputs(self) -> dict[str, Tensor]:
        """Of :func:`trimode.plugins.reference.attention.attend`. Rows of the pool that were not written are NaN."""
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
        if self.scaled:
            inputs["output_scale"] = torch.rand(self.kv_heads * self.group * self.head_dim, generator=random) + 0.5
        return inputs


@st.composite
def attention_cases(draw: Any) -> AttentionCase:
    """At most one long sequence and four tiles of queries, since the interpreter takes time for each tile."""
    committed = draw(st.lists(st.integers(0, 200), max_size=7))
    committed.insert(draw(st.integers(0, len(committed))), draw(st.integers(0, 2000)))
    tactic = draw(st.sampled_from(Attend.TACTICS))
    group = draw(st.sampled_from(GROUPS))
    return AttentionCase(
        committed=tuple(committed),
        step=draw(st.integers(1, min(64, 4 * tactic.constants["BLOCK_M"] // group))),
        pattern=draw(st.sampled_from(["causal", "bidirectional", "masked"])),
        group=group,
        kv_heads=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([64, 128])),
        splits=draw(st.integers(1, 6)),
        slack=draw(st.integers(0, 70)),
        scaled=draw(st.booleans()),
        tactic=tactic,
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
    )


@dataclass(frozen=True)
class ProductCase:
    """x [rows, groups * group] times W [groups * group, columns]. split: parts of K may be separate programs.
    rank: 0 without an adapter.
    """

    rows: int
    groups: int
    columns: int
    group: int = 128
    split: bool = False
    rank: int = 0
    residual: bool = False
    normed: bool = False
    gated: bool = False
    for_norm: bool = False
    tactic: Tactic = Int4Product.TACTICS[0]
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def operator(self) -> Int4Product:
        return Int4Product(
            split=self.split,
            adapter=self.rank > 0,
            residual=self.residual,
            normed=self.normed,
            gated=self.gated,
            for_norm=self.for_norm,
        )

    @property
    def node(self) -> Node:
        inner = self.groups * self.group
        return self.operator.node(rows=self.rows, inner=inner, columns=self.columns, group=self.group, rank=self.rank)

    def inputs(self) -> dict[str, Tensor]:
        """Of :func:`trimode.plugins.reference.int4_product.int4_product`, and the counters of a split product."""
        random, shapes = torch.Generator().manual_seed(self.seed), self.node.shapes
        inner = self.groups * self.group
        # Products of a few units, as activations are.
        weight = 0.3 / inner**0.5 if self.gated else 1.0
        # Adapter and residual are as large as the product itself, so that a missing one exceeds the tolerance.
        sizes = {"narrow": inner**0.5, "adapter_up": 4.0, "residual": inner**0.5 * 4, "scale": weight}
        inputs = {}
        for name, shape in shapes.items():
            if name == "packed":
                inputs[name] = torch.randint(-(2**31), 2**31, shape, generator=random, dtype=torch.int32)
            elif name == "counters":
                inputs[name] = torch.zeros(shape, dtype=torch.int32)
            else:
                dtype = torch.float32 if name in ("scale", "squares", "epsilon") else self.dtype
                inputs[name] = torch.randn(shape, generator=random).to(dtype) * sizes.get(name, 1.0)
        if self.normed:
            # Of a stream whose rows differ in size, so that a missing norm exceeds the tolerance.
            inputs["squares"] = 64 * inputs["squares"].square() * torch.arange(1, self.rows + 1)
            inputs["epsilon"] = torch.tensor([0.1])
        return inputs


@st.composite
def product_cases(draw: Any) -> ProductCase:
    group = draw(st.sampled_from([128, 128, 128, 256, 96, 64, 32, 16]))
    case = ProductCase(
        rows=draw(st.integers(1, 70) | st.integers(SPLIT_ROWS + 1, SPLIT_ROWS + 20)),
        groups=draw(st.integers(1, 5)),
        columns=2 * draw(st.integers(1, 150)),
        group=group,
        rank=draw(st.sampled_from([0, 8, 24, 64, 128])),
        residual=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
    )
    if group != 96 and draw(st.integers(0, 3)) == 0:
        case = replace(case, groups=2048 // group, columns=2 * draw(st.integers(1, 70)), split=True)
    if draw(st.integers(0, 3)) == 0:
        case = replace(case, columns=16 * draw(st.integers(1, 18)), rank=0, residual=False)
        case = replace(case, gated=True, normed=draw(st.booleans()))
    elif draw(st.booleans()):
        case = replace(case, residual=True, for_norm=True)
    elif not (case.residual or case.rank):
        case = replace(case, normed=True)
    return replace(case, tactic=draw(st.sampled_from(list(case.operator.tactics(case.node).values()))))


def operator_inputs(
    name: str,
    dtype: torch.dtype,
    *,
    batch: int = 2,
    step: int = 5,
    width: int = 70,
    vocabulary: int = 640,
    top_k: int = 5,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Random inputs and the attributes of an operator that has no case of its own.

    Memory that the kernel must not use is NaN: rows of the table and of ``x`` that no index names.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    def different(limit: int, *shape: int) -> Tensor:
        """Integers below ``limit``; those of the last dimension differ."""
        return torch.rand(*shape[:-1], limit, generator=random).argsort(-1)[..., : shape[-1]].contiguous()

    nan, rows = float("nan"), max(1, step - 2)
    if name.startswith("Embed"):
        ids = different(vocabulary, batch * step).reshape(batch, step)
        unused = torch.ones(vocabulary, dtype=torch.bool).index_fill(0, ids.flatten(), False)
        weight = {"next_weight": normal(width)} if name == "EmbedForNorm" else {}
        return {"input_ids": ids, "table": normal(vocabulary, width).masked_fill(unused[:, None], nan), **weight}, {}
    if name == "SelectRows":
        chosen = different(step, batch, rows)
        unused = torch.ones(batch, step, dtype=torch.bool).scatter(1, chosen, False)
        return {"x": normal(batch, step, width).masked_fill(unused[..., None], nan), "logit_rows": chosen}, {}
    if name == "Rotations":
        return {
            "position_ids": different(1000, batch, step),
            "frequencies": torch.rand(width // 2, generator=random),
            "key_scale": torch.tensor([1.25]),
            "query_scales": torch.rand(4, generator=random) + 0.5,
        }, {"length": 16384}
    if name == "RmsNorm":
        return {"x": normal(batch, step, width), "weight": normal(width), "epsilon": torch.tensor([0.1])}, {}
    if name == "SwiGlu":
        return {"gate_up": normal(batch, step, 2 * width) * 3}, {}
    if name.startswith("DenseProduct"):
        operator = OPERATORS[name]
        assert isinstance(operator, DenseProduct)
        # Inner columns for two parts, each of an odd number of tiles.
        inner = 2 * (512 + width) if operator.split else width
        columns = min(width + 7, 200) if operator.split else width + 7
        node = operator.node(batch=batch, step=step, inner=inner, columns=columns, rank=24)
        # As large as the product itself, so that a missing term exceeds the tolerance.
        scales = {"narrow": (width / 24) ** 0.5, "residual": width**0.5}
        return {
            operand: torch.zeros(shape, dtype=torch.int32)
            if operand == "counters"
            else normal(*shape) * scales.get(operand, 1)
            for operand, shape in node.shapes.items()
        }, {}
    operator = OPERATORS[name]
    if isinstance(operator, Head):
        return head_inputs(operator, dtype, batch, rows, vocabulary, top_k=top_k, seed=seed)
    assert name == "MergeCandidates"
    # The best tokens of a row are in different tiles.
    logits = normal(batch, rows, vocabulary // TILE, TILE)
    logits[..., 0] += 9
    attributes = {"top_k": top_k, "mask_token": HEAD_MASK_TOKEN}
    tiles = tiles_of_logits(logits.float().flatten(2), torch.empty(batch, rows, 0, dtype=torch.long), **attributes)
    found = zip(("tile_logits", "tile_tokens", "tile_sums", "logits"), tiles[:-1], strict=True)
    return {name: tensor.contiguous() for name, tensor in found}, {"top_k": top_k}


def head_inputs(
    operator: Head,
    dtype: torch.dtype,
    batch: int,
    rows: int,
    vocabulary: int,
    *,
    groups: int = 3,
    group: int = 32,
    top_k: int = 5,
    asked: int = 3,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Small integers, and rows of a norm that are no longer than it wants: logits are exact in any order of their sums,
    and many are equal. Of the masks, one has no legal token, one a single one, and one none in the first tile. The mask
    token's weights are large.
    """
    random = torch.Generator().manual_seed(seed)
    inner = groups * group

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=random)

    sizes = {"batch": batch, "rows": rows, "inner": inner, "vocabulary": vocabulary, "asked": min(asked, vocabulary)}
    attributes = {"top_k": top_k, "mask_token": HEAD_MASK_TOKEN}
    if isinstance(operator, Int4Head):
        shapes = operator.head_node(**sizes, **attributes, group=group).shapes
    else:
        shapes = operator.head_node(**sizes, **attributes).shapes
    inputs = {"x": below(2, *shapes["x"]).to(dtype)}
    if isinstance(operator, Int4Head):
        words = torch.randint(-(2**31), 2**31, shapes["packed"], generator=random, dtype=torch.int32)
        inputs |= {"packed": words, "scale": 2.0 ** below(1, *shapes["scale"])}
        inputs["scale"][:, HEAD_MASK_TOKEN] = 64
    else:
        inputs["weight"] = below(7, *shapes["weight"]).to(dtype)
        inputs["weight"][:, HEAD_MASK_TOKEN] = 64
    if "squares" in shapes:
        inputs["squares"] = torch.zeros(shapes["squares"])
        # The roots of the mean squares are 1, 2, 4 and so on.
        inputs["squares"][0] = inner * 4.0 ** (torch.arange(batch * rows) % 4)
        inputs["epsilon"] = torch.tensor([2.0**-60])
    if operator.masked:
        words = torch.randint(-(2**31), 2**31, shapes["token_mask"], generator=random, dtype=torch.int32)
        words[0, 0, : TILE // 32] = 0
        words[-1, -1] = 0
        words[0, -1] = 0
        words[0, -1, -1] = 1
        inputs["token_mask"] = words
    ids = torch.rand(batch, rows, vocabulary, generator=random).argsort(-1)
    inputs["asked_ids"] = ids[..., : sizes["asked"]].contiguous()
    return {operand.name: inputs[operand.name] for operand in operator.inputs}, attributes
