"""The parts of the GPU check. Each launches kernels, compares the results with the references, and times the kernels.

A host executes the launches: a GPU (scripts/gpu/cuda_host.py) with the sizes of the 8B checkpoint, or in a dry run the
interpreter with small sizes.

Unwritten rows of the pool are NaN. The weights of products do not fit into the L2 cache. KV write and attention read
the same inputs in every run. Small inputs then come from the cache, and these kernels may beat their lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from scripts.gpu.kernel_launch import KernelLaunch, prepare, tile_name
from scripts.gpu.kernels_8b import ATTENTION, HIDDEN, PRODUCTS, QKV, SPLITS, VOCABULARY, Product
from trimode.plugins.operators import (
    Attend,
    Int4Product,
    KvWrite,
    MergeSplits,
    Node,
    Operator,
    Pattern,
    QkvProduct,
    Tactic,
)
from trimode.plugins.reference import attention, int4_product, kv_write, norm_terms, qkv_product
from trimode.plugins.traffic import (
    attend_traffic,
    int4_product_traffic,
    kv_write_traffic,
    merge_traffic,
    needed_bytes,
    qkv_product_traffic,
)

REAL = torch.bfloat16
REAL_BYTES = 2
# Largest relative error of a kernel in bf16, whose steps are 2^-8.
TOLERANCE = 1e-2
# More than the L2 cache of any GPU: inputs that are read repeatedly come from memory every time.
CACHE_BYTES = 160 << 20
Part = Literal["kv write", "attention", "products", "qkv products", "same bits"]
PARTS: tuple[Part, ...] = get_args(Part)
# Of the engines' graphs.
PATTERNS: tuple[Pattern, ...] = ("bidirectional", "masked")


class Host(Protocol):
    device: str

    def launch(self, kernel: str, launched: KernelLaunch) -> None:
        """Execute once. kernel: the name of the compiled kernel."""

    def microseconds(self, run: Callable[[int], object], runs: int) -> float | None:
        """Median time of ``run(i)`` over i < ``runs``; None if the host's time is meaningless."""


@dataclass(frozen=True)
class Result:
    """error: relative, in the L2 norm. least_bytes: bytes that any kernel must move."""

    kernel: str
    case: str
    tactic: str
    error: float
    microseconds: float | None
    least_bytes: int

    @property
    def right(self) -> bool:
        """False for NaN as well: an output that was not written."""
        return self.error <= TOLERANCE

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "right": self.right}


class CheckedStep(NamedTuple):
    """committed: rows of the longest sequence; each of the others has ``apart`` rows less than the one before it."""

    batch: int
    tokens: int
    committed: int
    apart: int = 37

    def __str__(self) -> str:
        ragged = "" if self.apart == 37 else f", lengths {self.apart} apart"
        return f"batch {self.batch}, step {self.tokens}, {self.committed} rows{ragged}"


@dataclass(frozen=True)
class CheckSizes:
    """Sizes of a run. steps: of attention and of the KV write. rows: of timed products. same_rows: of products that are
    compared bit for bit. hidden: the inner size of ``qkv``.
    """

    attention: dict[str, int]
    splits: int
    steps: tuple[CheckedStep, ...]
    products: dict[str, Product]
    rows: tuple[int, ...]
    same_rows: tuple[int, ...]
    qkv: QkvProduct
    hidden: int


SIZES_8B = CheckSizes(
    ATTENTION,
    SPLITS,
    (
        *(CheckedStep(1, tokens, committed) for tokens in (1, 32) for committed in (0, 512, 4096, 32000)),
        *(CheckedStep(1, 64, 4096), CheckedStep(1, 256, 4096), CheckedStep(4, 8, 2000), CheckedStep(4, 32, 2000)),
        *(CheckedStep(16, 1, 4096), CheckedStep(16, 16, 2000), CheckedStep(16, 32, 4096)),
        # About as many KV rows as 16 sequences of 4,096, in sequences of 480 to 7,680.
        *(CheckedStep(16, tokens, 7680, apart=480) for tokens in (1, 32)),
    ),
    {**PRODUCTS, "head": Product(Int4Product(normed=True), HIDDEN, VOCABULARY)},
    (1, 4, 16, 32, 64, 256, 512),
    (1, 8, 32, 64, 100, 256),
    QKV,
    HIDDEN,
)
SMALL_SIZES = CheckSizes(
    {"kv_heads": 2, "group": 2, "head_dim": 64},
    4,
    (CheckedStep(2, 5, 130), CheckedStep(1, 1, 0)),
    {
        "fused": Product(Int4Product(adapter=True, residual=True), 256, 130, 16),
        "split": Product(Int4Product(split=True, adapter=True, residual=True, for_norm=True), 2048, 130, 16),
        "gated": Product(Int4Product(normed=True, gated=True), 256, 144),
    },
    (1, 5),
    (1, 8, 70),
    QkvProduct(split=True, normed=True),
    2048,
)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error in the L2 norm; NaN where an output was not written."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def used_nodes(sizes: CheckSizes) -> Iterator[tuple[Operator, Node]]:
    """Every operator of a run, with the sizes that its kernel is compiled for."""
    fixed = {**sizes.attention, "batch": 1, "step": 1}
    yield KvWrite(), KvWrite.node(capacity=1, **fixed)
    for pattern in PATTERNS:
        yield (attend := Attend(pattern)), attend.node(capacity=1, splits=sizes.splits, **fixed)
    yield (merge := MergeSplits(output_scale=True)), merge.node(splits=sizes.splits, **fixed)
    for product in sizes.products.values():
        yield product.operator, product.node(1)
    yield sizes.qkv, sizes.qkv.qkv_node(capacity=1, inner=sizes.hidden, **fixed)


def run_part(part: Part, host: Host, sizes: CheckSizes) -> Iterator[Result]:
    parts = {
        "kv write": _kv_writes,
        "attention": _attention,
        "products": _products,
        "qkv products": _qkv_products,
        "same bits": _same_bits,
    }
    return parts[part](host, sizes)


def median_microseconds(host: Host, kernel: str, launches: list[KernelLaunch], runs: int) -> float | None:
    """Median time of one launch over ``runs``, which cycle through ``launches``."""
    return host.microseconds(lambda run: host.launch(kernel, launches[run % len(launches)]), runs)


def _normal(host: Host, random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, device=host.device).to(REAL)


def _generator(host: Host, seed: int) -> torch.Generator:
    return torch.Generator(host.device).manual_seed(seed)


def _write_inputs(host: Host, sizes: CheckSizes, checked: CheckedStep) -> dict[str, Tensor]:
    """With a pool of random rows."""
    random = _generator(host, 2)
    batch, step, committed, apart = checked
    capacity = -(-(committed + step + 40) // 64) * 64
    node = KvWrite.node(batch=batch, step=step, capacity=capacity, **sizes.attention)
    inputs = {name: _normal(host, random, *shape) for name, shape in node.shapes.items()}
    firsts = [max(0, committed - apart * sequence) for sequence in range(batch)]
    return {**inputs, "write_indices": torch.tensor(firsts, device=host.device)}


def _kv_writes(host: Host, sizes: CheckSizes) -> Iterator[Result]:
    operator = KvWrite()
    for checked in sizes.steps:
        inputs = _write_inputs(host, sizes, checked)
        wanted = {**inputs, **{name: inputs[name].clone() for name in ("k_cache", "v_cache")}}
        expected = (kv_write.kv_write(**wanted), wanted["k_cache"], wanted["v_cache"])
        for number, tactic in operator.tactics(KvWrite.node(batch=1, step=1, capacity=1, **sizes.attention)).items():
            given = {**inputs, **{name: inputs[name].clone() for name in ("k_cache", "v_cache")}}
            launched = prepare(operator, given, tactic)
            name = operator.kernel_name(launched.node, number)
            host.launch(name, launched)
            error = max(distance(*pair) for pair in zip(launched.outputs, expected, strict=True))
            yield Result(
                operator.name,
                str(checked),
                f"{tactic.warps} warps",
                error,
                median_microseconds(host, name, [launched], 20),
                needed_bytes(kv_write_traffic(launched.node, REAL_BYTES)),
            )


def _attention(host: Host, sizes: CheckSizes) -> Iterator[Result]:
    """Attention, and the merge as engines of AWQ's weights launch it: compared together and timed separately."""
    for checked in sizes.steps:
        batch, step = checked.batch, checked.tokens
        written = _write_inputs(host, sizes, checked)
        head_dim = sizes.attention["head_dim"]
        inputs = {name: written[name] for name in ("k_cache", "v_cache", "write_indices")}
        rows = torch.arange(inputs["k_cache"].shape[2], device=host.device)
        unwritten = rows >= inputs["write_indices"][:, None] + step
        for name in ("k_cache", "v_cache"):
            inputs[name].masked_fill_(unwritten[:, None, :, None], float("nan"))
        heads = sizes.attention["kv_heads"] * sizes.attention["group"]
        queries = _normal(host, _generator(host, 3), batch, heads, step, head_dim)
        inputs = {"q": (queries / head_dim**0.5).contiguous(), **inputs}
        scale = torch.rand(heads * head_dim, generator=_generator(host, 5), device=host.device) + 0.5
        lengths = torch.full((batch,), step, device=host.device)
        triangle = torch.ones(step, step, dtype=torch.bool, device=host.device).tril()
        mask = triangle.expand(batch, -1, -1).contiguous()
        visibility: dict[Pattern, dict[str, Tensor]] = {
            "bidirectional": {"step_lengths": lengths},
            "masked": {"block_mask": mask},
        }
        for pattern in PATTERNS:
            seen = {**inputs, **visibility[pattern]}
            expected = torch.cat(
                [
                    attention.attend(
                        **{name: tensor[sequence : sequence + 1] for name, tensor in seen.items()}, output_scale=scale
                    )
                    for sequence in range(batch)
                ]
            )
            yield from _attention_and_merge(host, sizes, Attend(pattern), seen, scale, expected, str(checked))


def _attention_and_merge(
    host: Host,
    sizes: CheckSizes,
    operator: Attend,
    inputs: dict[str, Tensor],
    output_scale: Tensor,
    expected: Tensor,
    case: str,
) -> Iterator[Result]:
    merge, attributes = MergeSplits(output_scale=True), {"splits": sizes.splits, "group": sizes.attention["group"]}
    rows = [int(first) for first in inputs["write_indices"]]
    for number, tactic in enumerate(Attend.TACTICS, 1):
        over_splits = prepare(operator, inputs, tactic, {"splits": sizes.splits})
        name = operator.kernel_name(over_splits.node, number)
        host.launch(name, over_splits)
        partial, log_sum_exp = over_splits.outputs
        traffic = attend_traffic(operator, over_splits.node, tactic, rows, REAL_BYTES)
        for merge_number, merge_tactic in enumerate(MergeSplits.TACTICS, 1):
            parts = {"partial": partial, "log_sum_exp": log_sum_exp, "output_scale": output_scale}
            merged = prepare(merge, parts, merge_tactic, attributes)
            merge_name = merge.kernel_name(merged.node, merge_number)
            host.launch(merge_name, merged)
            error = distance(merged.outputs[0], expected)
            if merge_number == 1:
                took = median_microseconds(host, name, [over_splits], 10)
                block = f"{tactic.constants['BLOCK_M']} queries"
                yield Result(operator.name, case, block, error, took, needed_bytes(traffic))
            if number == 1 and operator.pattern == "bidirectional":
                took = median_microseconds(host, merge_name, [merged], 10)
                least = needed_bytes(merge_traffic(merged.node, operator.pattern, rows, REAL_BYTES))
                yield Result(merge.name, case, f"{merge_tactic.warps} warps", error, took, least)


def _products(host: Host, sizes: CheckSizes) -> Iterator[Result]:
    """Runs cycle through copies of the weights that together exceed the L2 cache."""
    for label, product in sizes.products.items():
        copies = (
            2 if host.device == "cpu" else max(2, min(16, CACHE_BYTES // (product.inner * product.columns // 2) + 1))
        )
        for rows in sizes.rows:
            inputs = product_inputs(host, product, product.node(rows))
            expected = expected_product(product, inputs)
            packed = [inputs["packed"], *(inputs["packed"].clone() for _ in range(copies - 1))]
            for number, tactic in product.operator.tactics(product.node(rows)).items():
                block_m = tactic.constants["BLOCK_M"]
                if block_m >= 4 * max(rows, 16) or rows > 8 * block_m:  # far from the fastest
                    continue
                launches = [prepare(product.operator, {**inputs, "packed": words}, tactic) for words in packed]
                node, name = launches[0].node, product.operator.kernel_name(launches[0].node, number)
                host.launch(name, launches[0])
                error = product_error(launches[0], expected)
                took = median_microseconds(host, name, launches, copies)
                yield Result(
                    product.operator.name,
                    f"{label}, {rows} rows",
                    tile_name(tactic),
                    error,
                    took,
                    _least_product_bytes(product, node, tactic),
                )
            if host.device != "cpu":
                yield from _peers(host, label, product, inputs["x"], copies)


def _qkv_products(host: Host, sizes: CheckSizes) -> Iterator[Result]:
    """Runs cycle through copies of the weights that together exceed the L2 cache."""
    operator = sizes.qkv
    for checked in sizes.steps:
        written = _write_inputs(host, sizes, checked)
        (batch, step, *_), capacity = checked, written["k_cache"].shape[2]
        node = operator.qkv_node(batch=batch, step=step, capacity=capacity, inner=sizes.hidden, **sizes.attention)
        columns = node.shapes["scale"][1]
        inputs = product_inputs(host, Product(operator, sizes.hidden, columns), node)
        inputs |= {name: tensor for name, tensor in written.items() if name in inputs}
        wanted = {name: tensor.clone() for name, tensor in inputs.items() if name != "counters"}
        expected = (qkv_product.qkv_product(**wanted), wanted["k_cache"], wanted["v_cache"])
        copies = 2 if host.device == "cpu" else max(2, CACHE_BYTES // inputs["packed"].nbytes + 1)
        packed = [inputs["packed"], *(inputs["packed"].clone() for _ in range(copies - 1))]
        for number, tactic in operator.tactics(node).items():
            block_m = tactic.constants["BLOCK_M"]
            if block_m >= 4 * max(batch * step, 16) or batch * step > 8 * block_m:  # far from the fastest
                continue
            caches = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
            launches = [prepare(operator, {**inputs, **caches, "packed": words}, tactic) for words in packed]
            name = operator.kernel_name(node, number)
            host.launch(name, launches[0])
            found = (launches[0].outputs[0], caches["k_cache"], caches["v_cache"])
            traffic = qkv_product_traffic(operator, node, tactic, REAL_BYTES)
            yield Result(
                operator.name,
                str(checked),
                tile_name(tactic),
                max(distance(*pair) for pair in zip(found, expected, strict=True)),
                median_microseconds(host, name, launches, copies),
                needed_bytes({name: tensor for name, tensor in traffic.items() if name not in ("partial", "counters")}),
            )


def _same_bits(host: Host, sizes: CheckSizes) -> Iterator[Result]:
    """The last row of a step of any length has the bits that it has in a step of one row, in every tactic. The error
    is the number of its outputs that differ.
    """
    for label, product in sizes.products.items():
        longest = product_inputs(host, product, product.node(max(sizes.same_rows)))
        expected = None
        for rows in sizes.same_rows:
            inputs = {
                name: tensor[-rows:].contiguous() if name in _ACTIVATIONS else tensor
                for name, tensor in longest.items()
            }
            if "squares" in inputs:
                inputs["squares"] = inputs["squares"][:, -rows:].contiguous()
            for number, tactic in product.operator.tactics(product.node(rows)).items():
                launched = prepare(product.operator, inputs, tactic)
                host.launch(product.operator.kernel_name(launched.node, number), launched)
                last = torch.cat(_last_row(product.operator, launched.outputs))
                expected = last if expected is None else expected
                differ = float((last != expected).sum())
                yield Result(
                    product.operator.name,
                    f"{label}, last of {rows} rows",
                    tile_name(tactic),
                    differ,
                    None,
                    _least_product_bytes(product, launched.node, tactic),
                )


def _last_row(operator: Int4Product, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Its outputs, in fp32."""
    terms = [outputs[1][-1], outputs[2][:, -1]] if operator.for_norm else []
    return [tensor.float() for tensor in (outputs[0][-1], *terms)]


_ACTIVATIONS = ("x", "narrow", "residual")


def product_inputs(host: Host, product: Product, node: Node) -> dict[str, Tensor]:
    random, inputs = _generator(host, 1), {}
    for name, shape in node.shapes.items():
        if name == "packed":
            inputs[name] = torch.randint(
                -(2**31), 2**31, shape, generator=random, dtype=torch.int32, device=host.device
            )
        elif name == "scale":
            # Products of a few units, as activations are.
            size = 0.2 / product.inner**0.5
            inputs[name] = (torch.rand(shape, generator=random, device=host.device) + 0.5) * size
        elif name == "counters":
            inputs[name] = torch.zeros(shape, dtype=torch.int32, device=host.device)
        elif name == "squares":
            inputs[name] = 64 * (torch.rand(shape, generator=random, device=host.device) + 0.5)
        elif name == "epsilon":
            inputs[name] = torch.full(shape, 1e-5, device=host.device)
        else:
            inputs[name] = _normal(host, random, *shape)
    return inputs


def expected_product(product: Product, inputs: dict[str, Tensor]) -> Tensor:
    given = {name: tensor for name, tensor in inputs.items() if name not in ("counters", "next_weight")}
    return int4_product.int4_product(**given, gated=product.operator.gated)


def product_error(launched: KernelLaunch, expected: Tensor) -> float:
    """Of y, and of what the operator computes of the norm behind it, which follows from y."""
    y, *others = launched.outputs
    errors = [distance(y, expected)]
    if (weight := launched.arguments.get("next_weight")) is not None:
        assert isinstance(weight, Tensor)
        terms = norm_terms.norm_terms(y, weight)
        errors += [distance(*pair) for pair in zip(others[:2], terms, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")


def _least_product_bytes(product: Product, node: Node, tactic: Tactic) -> int:
    """Without the parts' sums: another kernel might not need any."""
    traffic = int4_product_traffic(product.operator, node, tactic, REAL_BYTES)
    return needed_bytes({name: tensor for name, tensor in traffic.items() if name not in ("partial", "counters")})


def _peers(host: Host, label: str, product: Product, x: Tensor, copies: int) -> Iterator[Result]:
    """torch's own products of the same shape: bf16 by cuBLAS, and int4 with groups of 128. Only their time counts."""
    inner, columns, case = product.inner, product.columns, f"{label}, {x.shape[0]} rows"
    activations = 2 * x.shape[0] * (inner + columns)

    def timed(name: str, weights: list[Tensor], multiply: Callable[[Tensor], object], moved: int) -> Result:
        took = host.microseconds(lambda run: multiply(weights[run % len(weights)]), 2 * len(weights))
        return Result(name, case, "-", 0.0, took, moved + activations)

    dense = [_normal(host, _generator(host, 4), columns, inner) for _ in range(min(copies, 4))]
    yield timed("cuBLAS bf16", dense, lambda weight: x @ weight.T, dense[0].nbytes)
    dense.clear()
    integers = torch.randint(0, 256, (columns, inner // 2), dtype=torch.uint8, device=host.device)
    packed = [torch.ops.aten._convert_weight_to_int4pack(integers, 8) for _ in range(copies)]
    factors = torch.rand(inner // 128, columns, 2, device=host.device).to(REAL)
    yield timed(
        "_weight_int4pack_mm",
        packed,
        lambda weight: torch.ops.aten._weight_int4pack_mm(x, weight, 128, factors),
        packed[0].nbytes + factors.nbytes,
    )
