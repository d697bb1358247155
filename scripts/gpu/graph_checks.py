"""The part of the GPU check for the operators around the layers' int4 products and attention: embedding, rotations,
norms, activation, 16-bit products, heads and candidates.

Each kernel is compared with its reference and timed. The weights of the products do not fit into the L2 cache. All
other inputs are the same in every run, so small ones come from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scripts.gpu.kernel_checks import CACHE_BYTES, REAL, REAL_BYTES, Host, Result, distance
from scripts.gpu.kernel_launch import node_of, prepare
from scripts.gpu.kernels_8b import ADAPTER_RANK, ATTENTION, HIDDEN, INTERMEDIATE, KV_WIDTH, QUERY_WIDTH, VOCABULARY
from trimode.plugins.operators import (
    DenseHead,
    DenseProduct,
    Embed,
    Head,
    Int4Head,
    MergeCandidates,
    Node,
    Operator,
    RmsNorm,
    Rotations,
    SelectRows,
    SwiGlu,
)
from trimode.plugins.reference import (
    candidates,
    dense_product,
    embed,
    head_product,
    rms_norm,
    rotations,
    select_rows,
    swiglu,
)
from trimode.plugins.traffic import needed_bytes, operator_traffic

PART = "graph operators"
MASK_TOKEN, LENGTH, SCALES, ASKED = 100, 16384, 16, 8
HEADS: tuple[Head, ...] = (
    Int4Head(normed=True),
    Int4Head(normed=True, masked=True),
    DenseHead(),
    DenseHead(masked=True),
)
_RUNS = 20


class DenseSizes(NamedTuple):
    """A product x [rows, inner] W [inner, columns]. rank: of the adapter, 0 without one."""

    operator: DenseProduct
    inner: int
    columns: int
    rank: int = 0


@dataclass(frozen=True)
class GraphSizes:
    """steps: batch and tokens. group: rows of an int4 matrix that share a scale. top_k: candidates of a row."""

    steps: tuple[tuple[int, int], ...]
    hidden: int
    intermediate: int
    vocabulary: int
    head_dim: int
    group: int
    top_k: tuple[int, ...]
    products: dict[str, DenseSizes]


SIZES_8B = GraphSizes(
    ((1, 1), (1, 32), (4, 16), (1, 256)),
    HIDDEN,
    INTERMEDIATE,
    VOCABULARY,
    ATTENTION["head_dim"],
    128,
    (1, 64),
    {
        "qkv": DenseSizes(DenseProduct(), HIDDEN, QUERY_WIDTH + 2 * KV_WIDTH),
        "adapter down": DenseSizes(DenseProduct(split=True, row_scale=True), QUERY_WIDTH, ADAPTER_RANK),
        "o": DenseSizes(DenseProduct(residual=True), QUERY_WIDTH, HIDDEN),
        "o with adapter": DenseSizes(DenseProduct(adapter=True, residual=True), QUERY_WIDTH, HIDDEN, ADAPTER_RANK),
        "down": DenseSizes(DenseProduct(residual=True), INTERMEDIATE, HIDDEN),
    },
)
SMALL_SIZES = GraphSizes(
    ((2, 3),),
    96,
    40,
    500,
    32,
    48,
    (1, 5),
    {
        "adapter down": DenseSizes(DenseProduct(split=True, row_scale=True), 1024, 24),
        "o with adapter": DenseSizes(DenseProduct(adapter=True, residual=True), 72, 40, 24),
    },
)


@dataclass(frozen=True)
class Case:
    """One comparison. weight: the input of which there are several copies, so that it comes from memory."""

    operator: Operator
    inputs: dict[str, Tensor]
    reference: Callable[..., Any]
    attributes: Mapping[str, int] = field(default_factory=dict)
    label: str = ""
    weight: str | None = None


def used_nodes(sizes: GraphSizes) -> Iterator[tuple[Operator, Node]]:
    """Every operator of a run, with the sizes that its kernel is compiled for."""
    for operator in (Embed(), Embed(for_norm=True)):
        yield operator, operator.node(batch=1, step=1, vocabulary=sizes.vocabulary, width=sizes.hidden)
    yield Rotations(), Rotations.node(batch=1, step=1, head_dim=sizes.head_dim, scales=SCALES, length=LENGTH)
    yield RmsNorm(), RmsNorm.node(rows=1, width=sizes.hidden)
    yield SwiGlu(), SwiGlu.node(rows=1, width=sizes.intermediate)
    yield SelectRows(), SelectRows.node(batch=1, step=1, rows=1, width=sizes.hidden)
    for product in sizes.products.values():
        size = {"inner": product.inner, "columns": product.columns, "rank": product.rank}
        yield product.operator, product.operator.node(step=1, **size)
    for top_k in sizes.top_k:
        for head in HEADS:
            yield head, head_node(head, sizes, 1, 1, top_k)
        yield MergeCandidates(), MergeCandidates.node(batch=1, rows=1, vocabulary=sizes.vocabulary, top_k=top_k)


def head_node(head: Head, sizes: GraphSizes, batch: int, rows: int, top_k: int) -> Node:
    given = {"batch": batch, "rows": rows, "inner": sizes.hidden, "vocabulary": sizes.vocabulary, "asked": ASKED}
    if isinstance(head, Int4Head):
        return head.head_node(**given, top_k=top_k, mask_token=MASK_TOKEN, group=sizes.group)
    return head.head_node(**given, top_k=top_k, mask_token=MASK_TOKEN)


def run_part(host: Host, sizes: GraphSizes) -> Iterator[Result]:
    for batch, step in sizes.steps:
        for case in _cases(host, sizes, batch, step):
            yield from _results(host, case, f"{case.label}batch {batch}, step {step}")


def _cases(host: Host, sizes: GraphSizes, batch: int, step: int) -> Iterator[Case]:
    random = torch.Generator(host.device).manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=host.device).to(REAL)

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=random, device=host.device)

    x, epsilon = normal(batch, step, sizes.hidden), torch.tensor([1e-5], device=host.device)
    table = normal(sizes.vocabulary, sizes.hidden)
    given = {"input_ids": below(sizes.vocabulary, batch, step), "table": table}
    yield Case(Embed(), given, embed.embed)
    yield Case(Embed(for_norm=True), {**given, "next_weight": normal(sizes.hidden)}, embed.embed_for_norm)
    del table
    angles = {
        "position_ids": below(262144, batch, step),
        "frequencies": torch.rand(sizes.head_dim // 2, generator=random, device=host.device),
        "key_scale": torch.tensor([1.25], device=host.device),
        "query_scales": torch.rand(SCALES, generator=random, device=host.device),
    }
    yield Case(Rotations(), angles, _rotations, {"length": LENGTH})
    yield Case(RmsNorm(), {"x": x, "weight": normal(sizes.hidden), "epsilon": epsilon}, rms_norm.rms_norm)
    yield Case(SwiGlu(), {"gate_up": normal(batch, step, 2 * sizes.intermediate)}, swiglu.swiglu)
    yield Case(SelectRows(), {"x": x, "logit_rows": below(step, batch, step)}, select_rows.select_rows)
    for label, product in sizes.products.items():
        operator = product.operator
        size = {"inner": product.inner, "columns": product.columns, "rank": product.rank}
        shapes = operator.node(batch=batch, step=step, **size).shapes
        inputs = {
            name: torch.zeros(shape, dtype=torch.int32, device=host.device) if name == "counters" else normal(*shape)
            for name, shape in shapes.items()
        }
        yield Case(operator, inputs, _dense_product, label=f"{label}, ", weight="weight")
    for top_k in sizes.top_k:
        yield from _head_cases(host, random, sizes, batch, step, HEADS, top_k)


def head_results(host: Host, sizes: GraphSizes, step: int, heads: Sequence[Head], top_k: int) -> Iterator[Result]:
    """Of one sequence."""
    random = torch.Generator(host.device).manual_seed(4)
    for case in _head_cases(host, random, sizes, 1, step, heads, top_k):
        yield from _results(host, case, f"{case.label}batch 1, step {step}")


def _head_cases(
    host: Host, random: torch.Generator, sizes: GraphSizes, batch: int, step: int, heads: Sequence[Head], top_k: int
) -> Iterator[Case]:
    """The heads, and the merge behind the last one."""
    attributes = {"top_k": top_k, "mask_token": MASK_TOKEN}
    for head in heads:
        inputs = head_inputs(host, random, head, head_node(head, sizes, batch, step, top_k))
        int4 = isinstance(head, Int4Head)
        reference = head_product.int4_head if int4 else head_product.dense_head
        weight = "packed" if int4 else "weight"
        yield Case(head, inputs, reference, attributes, f"top {top_k}, ", weight=weight)
    tiles = reference(**inputs, **attributes)[:4]
    given = zip(("tile_logits", "tile_tokens", "tile_sums", "logits"), tiles, strict=True)
    contiguous = {name: tensor.contiguous() for name, tensor in given}
    yield Case(MergeCandidates(), contiguous, candidates.merge_candidates, {"top_k": top_k}, f"top {top_k}, ")


def head_inputs(host: Host, random: torch.Generator, head: Head, node: Node) -> dict[str, Tensor]:
    """Small integers, so that logits are exact in any order of their sums, and candidates must be equal."""
    (_, _, inner), inputs = node.shapes["x"], {}

    def integers(limit: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(-limit, limit + 1, tuple(shape), generator=random, device=host.device)

    for operand in head.inputs:
        shape = node.shapes[operand.name]
        if operand.name in ("packed", "token_mask"):
            inputs[operand.name] = integers(2**31 - 1, shape).int()
        elif operand.name == "asked_ids":
            inputs[operand.name] = integers(10**9, shape) % head.constants(node)["COLUMNS"]
        elif operand.name == "squares":
            inputs[operand.name] = torch.full(tuple(shape), inner / shape[0], device=host.device)
        elif operand.name == "epsilon":
            inputs[operand.name] = torch.full((1,), 2.0**-60, device=host.device)
        elif operand.name == "scale":
            inputs[operand.name] = torch.ones(tuple(shape), device=host.device)
        else:
            inputs[operand.name] = integers(2, shape).to(REAL)
    return inputs


def _dense_product(*, counters: Tensor | None = None, **inputs: Tensor) -> Tensor:
    del counters
    return dense_product.dense_product(**inputs)


def _rotations(**inputs: Any) -> tuple[Tensor, ...]:
    return rotations.rotations(**inputs, real=REAL)


def _results(host: Host, case: Case, label: str) -> Iterator[Result]:
    operator, node = case.operator, node_of(case.inputs, case.attributes)
    expected = case.reference(**case.inputs, **case.attributes)
    wanted = (expected,) if isinstance(expected, Tensor) else expected
    many = [case.inputs]
    if case.weight is not None and host.device != "cpu":
        weight = case.inputs[case.weight]
        copies = CACHE_BYTES // weight.nbytes
        many += [{**case.inputs, case.weight: weight.clone()} for _ in range(copies)]
    for number, tactic in operator.tactics(node).items():
        if tactic.constants.get("BLOCK_M", 0) >= 4 * max(_rows(node), 16):  # far from the fastest
            continue
        name = operator.kernel_name(node, number)
        launches = [prepare(operator, inputs, tactic, case.attributes, REAL) for inputs in many]
        host.launch(name, launches[0])
        # Without the sums of parts.
        pairs = zip(launches[0].outputs[: len(wanted)], wanted, strict=True)
        error = float(torch.tensor([_error(found, right) for found, right in pairs]).max())
        took = host.microseconds(
            lambda run, name=name, launches=launches: host.launch(name, launches[run % len(launches)]),  # type: ignore[misc]
            max(_RUNS, len(launches)),
        )
        blocks = [f"{key[-1]}={value}" for key, value in tactic.constants.items() if key.startswith("BLOCK_")]
        shown = " ".join(blocks) or f"{tactic.warps} warps"
        least = needed_bytes(operator_traffic(operator, node, tactic, REAL_BYTES))
        yield Result(operator.name, label, shown, error, took, least)


def _rows(node: Node) -> int:
    found = 1
    for size in next(iter(node.shapes.values()))[:-1]:
        found *= size
    return found


def _error(found: Tensor, expected: Tensor) -> float:
    """Integers must be equal."""
    if expected.dtype.is_floating_point:
        return distance(found, expected)
    return 0.0 if torch.equal(found, expected) else float("inf")
