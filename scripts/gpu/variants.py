"""The part of the benchmark that times two forms of the same work in one run, over the same inputs.

- the head with its candidates, and the product alone with PyTorch's maximum and log-sum-exp of its logits;
- an int4 head, and a 16-bit one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from scripts.gpu import graph_checks
from scripts.gpu.graph_checks import GraphSizes
from scripts.gpu.kernel_checks import REAL_BYTES, Host, Result, distance
from scripts.gpu.kernel_launch import prepare, tile_name
from trimode.plugins.operators import (
    DenseHead,
    Int4Head,
    Int4Product,
    MergeCandidates,
    Node,
    Operator,
)
from trimode.plugins.reference import int4_product
from trimode.plugins.traffic import int4_product_traffic, needed_bytes

HEADS = (Int4Head(normed=True), DenseHead())
# Tokens of one request.
STEPS = (1, 32)
_RUNS = 20


def used_nodes(*, small: bool) -> Iterator[tuple[Operator, Node]]:
    """Every operator of a run, with the sizes that its kernel is compiled for."""
    sizes = _sizes(small=small)
    for head in HEADS:
        yield head, graph_checks.head_node(head, sizes, 1, 1, top_k=1)
    yield MergeCandidates(), MergeCandidates.node(batch=1, rows=1, vocabulary=sizes.vocabulary, top_k=1)
    yield _PRODUCT, _product_node(sizes, 1)


def _sizes(*, small: bool) -> GraphSizes:
    return graph_checks.SMALL_SIZES if small else graph_checks.SIZES_8B


_PRODUCT = Int4Product(normed=True)


def _product_node(sizes: GraphSizes, rows: int) -> Node:
    return _PRODUCT.node(rows=rows, inner=sizes.hidden, columns=sizes.vocabulary, group=sizes.group)


def variants(host: Host, *, small: bool = False) -> Iterator[Result]:
    """small: with sizes for the interpreter."""
    sizes = _sizes(small=small)
    for step in STEPS[:1] if small else STEPS:
        yield from graph_checks.head_results(host, sizes, step, HEADS, top_k=1)
        yield from _separate_head(host, sizes, step)


def _separate_head(host: Host, sizes: GraphSizes, rows: int) -> Iterator[Result]:
    """The product, and what follows it."""
    random = torch.Generator(host.device).manual_seed(4)
    inputs = graph_checks.head_inputs(host, random, HEADS[0], graph_checks.head_node(HEADS[0], sizes, 1, rows, top_k=1))
    inputs = {operand.name: inputs[operand.name] for operand in _PRODUCT.inputs} | {"x": inputs["x"][0]}
    node = _product_node(sizes, rows)
    tactics = _PRODUCT.tactics(node)
    number = _PRODUCT.default_tactic(node, tactics.keys())
    tactic, name = tactics[number], _PRODUCT.kernel_name(node, number)
    launched = prepare(_PRODUCT, inputs, tactic)
    host.launch(name, launched)
    logits = launched.outputs[0]
    error = distance(logits, int4_product.int4_product(**inputs))

    def both(_run: int) -> None:
        host.launch(name, launched)
        wide = logits.float()
        wide.max(-1)
        wide.logsumexp(-1)

    least = needed_bytes(int4_product_traffic(_PRODUCT, node, tactic, REAL_BYTES))
    took = host.microseconds(both, _RUNS)
    yield Result(
        f"{_PRODUCT.name}, max, logsumexp", f"top 1, batch 1, step {rows}", tile_name(tactic), error, took, least
    )
