"""What the compiled plans will do on a GPU, kernel by kernel and byte by byte, told without one.

The kernels are the builder's own list (:mod:`trimode.build.rtx.kernel_list`). It leaves dynamic dimensions open; they
are closed for one shape of pass at a time by the graph that the plan was compiled from: a tensor between two kernels is
a value between the graph's nodes that those kernels compute, maybe reshaped.

Counting rules. A kernel reads each of its inputs and constants once and writes each output once, whatever the caches
do. A lookup reads the rows it looks up, a slice the rows it keeps, and a write to the KV pool touches the step's rows
alone, since the builder gives it the same tensor as input and output. The fused attention, given the whole pool, has a
list of the tiles of 64 rows in which the mask is not empty; it reads these tiles, of keys, values and mask. Where no
graph value fits a tensor's open dimensions (the bookkeeping of the masks, mostly), it is left out and counted in
``unresolved``.

Two more totals bound that count from both sides: one in which the attention reads all the pool that it is given, and
one with the chip's last cache in it. There a tensor no larger than half the cache, which one kernel writes and the very
next reads, is read from the cache; if nothing later reads it, it is not written out either.

"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import mode
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper
from pydantic import BaseModel

from trimode.build.audit.roofline import PassShape, floor_bytes, floor_flops, stored_matrix_bytes
from trimode.build.graph.raw_pool import merged_matrices
from trimode.build.rtx.kernel_list import KernelList, KernelTensor, PlanKernel
from trimode.common.errors import TriModeError
from trimode.common.records import read_json_record
from trimode.engine.files import verify_file
from trimode.engine.manifest import Manifest
from trimode.engine.targets.rtx import GRAPH, KERNELS, RtxSection
from trimode.model.step import ENGINES, cache_outputs

Kind = Literal[
    "int4 product", "product", "dequantisation", "attention", "KV write", "KV copy", "mask", "head", "element-wise"
]
_BITS = {
    "Int4": 4,
    "Int8": 8,
    "Bool": 8,
    "Half": 16,
    "BFloat16": 16,
    "Int32": 32,
    "Float": 32,
    "Int64": 64,
}
_REAL_TYPES = {"Half", "BFloat16", "Float"}
_TILE = 64  # KV rows that the fused attention takes or leaves together


class PassAudit(BaseModel):
    """One pass of one engine. Bytes are of device memory; ``kernels_a_layer``: of most layers. ``ratio`` is to the
    floor; so are ``ratio_whole_pool``, if the attention reads the tiles that its list leaves out as well, and
    ``ratio_with_cache``.
    """

    engine: str
    batch: int
    step: int
    window: int
    kernels: int
    kernels_a_layer: int
    int4_products: int
    int4_matrices: int
    lone_dequantisations: int
    kv_copies: int
    bytes: int
    floor: int
    ratio: float
    ratio_whole_pool: float
    ratio_with_cache: float
    flops: int
    bytes_by_kind: dict[str, int]
    unresolved: int


@dataclass(frozen=True)
class Plan:
    """One engine of an engine directory, as far as an audit reads it."""

    engine: str
    manifest: Manifest
    rtx: RtxSection
    kernels: tuple[PlanKernel, ...]
    graph: onnx.ModelProto


def read_plans(folder: Path) -> list[Plan]:
    """Both plans of an engine directory; raises TriModeError if it is not of target rtx, or what is read was
    changed after the build.
    """
    manifest = Manifest.read(folder)
    section = manifest.target
    if not isinstance(section, RtxSection):
        raise TriModeError(f"{folder} is for target {section.name}; an audit reads the kernels of target rtx")
    plans = []
    for entry in manifest.files:
        if entry.path.endswith((KERNELS, GRAPH)):
            verify_file(folder, entry)
    for name, _ in ENGINES:
        kernels = read_json_record(KernelList, folder / name / KERNELS).root
        plans.append(Plan(name, manifest, section, kernels, onnx.load(folder / name / GRAPH, load_external_data=False)))
    return plans


def audit_pass(plan: Plan, batch: int, step: int, window: int, cache_bytes: int = 0) -> PassAudit:
    """Count a pass of ``step`` tokens a sequence, logits for all of them, over ``window`` KV rows, on a chip whose last
    cache holds ``cache_bytes``.
    """
    _refuse_impossible(plan, batch, step, window)
    sizes = _Sizes(plan, batch, step, window)
    unlisted = 0
    by_kind: Counter[Kind] = Counter()
    kinds: Counter[Kind] = Counter()
    layers: defaultdict[int, int] = defaultdict(int)
    for kernel in plan.kernels:
        kind = kind_of(kernel)
        kinds[kind] += 1
        by_kind[kind] += sizes.bytes_of(kernel)
        unlisted += sizes.unlisted_bytes(kernel)
        if (layer := _layer_of(kernel)) is not None:
            layers[layer] += 1
    config, precision = plan.manifest.model, plan.manifest.precision
    shape = PassShape(
        batch,
        step,
        window,
        step,
        plan.manifest.limits.top_k,
        plan.manifest.adapter.rank if plan.manifest.adapter and plan.engine == "diffusion" else 0,
    )
    floor, total = floor_bytes(config, shape, stored_matrix_bytes(config, precision)), sum(by_kind.values())
    return PassAudit(
        engine=plan.engine,
        batch=batch,
        step=step,
        window=window,
        kernels=len(plan.kernels),
        kernels_a_layer=mode(layers.values()),
        int4_products=sum(_reads_int4(kernel) and "MatMul" in _operators(kernel) for kernel in plan.kernels),
        int4_matrices=sum(precision.all_int4(modules) for modules in merged_matrices(config)),
        lone_dequantisations=kinds["dequantisation"],
        kv_copies=kinds["KV copy"],
        bytes=total,
        floor=floor,
        ratio=total / floor,
        ratio_whole_pool=(total + unlisted) / floor,
        ratio_with_cache=(total - sizes.cached_bytes(cache_bytes // 2)) / floor,
        flops=floor_flops(config, shape),
        bytes_by_kind={kind: count for kind, count in by_kind.most_common() if count},
        unresolved=sizes.unresolved,
    )


def cycle_bytes_to_host(manifest: Manifest, block_length: int) -> int:
    """Of one request's self-speculation cycle: candidates and log-sum-exp of the draft's masked rows and of the
    verification's rows."""
    a_row = manifest.limits.top_k * (4 + 8) + 4
    return a_row * (block_length - 1 + block_length)


def kind_of(kernel: PlanKernel) -> Kind:
    operators = _operators(kernel)
    if "Attention" in operators and kernel.name.startswith("_gemm_mha"):
        return "attention"
    if "DequantizeLinear" in operators:
        return "int4 product" if "MatMul" in operators else "dequantisation"
    if any("adapter_" in tensor.name for tensor in kernel.inputs) or kernel.kind == "gemm":
        return "product"
    if "TensorScatter" in operators and len(kernel.inputs) > 1:
        return "KV write"
    if any(_is_pool(tensor) for tensor in kernel.inputs):
        return "KV copy"
    if any(source.startswith("head/") for source in kernel.sources):
        return "head"
    if not kernel.sources or operators & {"LessOrEqual", "Less", "GatherElements", "And"}:
        return "mask"
    return "element-wise"


def _refuse_impossible(plan: Plan, batch: int, step: int, window: int) -> None:
    max_batch, max_step = plan.manifest.limits.largest_pass
    limits = {
        "batch": (batch, max_batch),
        "step": (step, max_step),
        "window": (window, plan.manifest.limits.capacity),
    }
    for name, (value, largest) in limits.items():
        if not 1 <= value <= largest:
            raise TriModeError(f"{name} {value} is outside the plan's 1 to {largest}; build with a larger limit")
    if step > window:
        raise TriModeError(f"step {step} exceeds the window {window}: a step's own rows are part of it")


class _Sizes:
    """Bytes of a plan's tensors for one shape of pass."""

    def __init__(self, plan: Plan, batch: int, step: int, window: int) -> None:
        config = plan.manifest.model
        rank = plan.manifest.adapter.rank if plan.manifest.adapter else 0
        dims = {"batch": batch, "step": step, "rows": step, "window": window, "rank": rank}
        self._tokens = batch * step
        self._vocab_size = config.vocab_size
        self._kv_row = config.kv_width  # elements of one of K and V, a token
        self._window = batch * window * config.kv_width
        self._capacity = plan.manifest.limits.capacity
        self._listed_rows = min(-(-window // _TILE) * _TILE, self._capacity)
        layers = config.num_hidden_layers
        self._shapes = _shapes(plan.graph, dims)
        self._kernels = plan.kernels
        self._produces = {node.name: list(node.output) for node in plan.graph.graph.node}
        self._made = {name for names in self._produces.values() for name in names} - set(cache_outputs(layers))
        self._reads = {node.name: list(node.input) for node in plan.graph.graph.node}
        self._writer: dict[str, PlanKernel] = {}
        self._written: dict[str, KernelTensor] = {}
        self._readers: defaultdict[str, list[PlanKernel]] = defaultdict(list)
        for kernel in plan.kernels:
            for tensor in kernel.outputs:
                self._writer[tensor.name] = kernel
                self._written[tensor.name] = tensor
            for tensor in kernel.inputs:
                self._readers[tensor.name].append(kernel)
        self.unresolved = 0

    def bytes_of(self, kernel: PlanKernel) -> int:
        operators = _operators(kernel)
        writes_pool = kind_of(kernel) == "KV write"
        moved = -self.unlisted_bytes(kernel)
        for tensor in _distinct(kernel.inputs):
            if not _is_pool(tensor):
                moved += self._tensor_bytes(tensor)
            elif "Slice" in operators and not writes_pool:
                moved += self._window * _BITS[tensor.dtype] // 8
            elif not writes_pool:  # what it writes it does not read
                moved += self._tensor_bytes(tensor)
        for tensor in kernel.constants:
            if "Gather" in operators and tensor.dims[:1] == (self._vocab_size,):
                moved += self._tokens * prod(tensor.dims[1:]) * _BITS[tensor.dtype] // 8
            else:
                moved += self._tensor_bytes(tensor)
        for tensor in _distinct(kernel.outputs):
            if writes_pool and _is_pool(tensor):
                moved += self._tokens * self._kv_row * _BITS[tensor.dtype] // 8
            else:
                moved += self._tensor_bytes(tensor)
        return moved

    def unlisted_bytes(self, kernel: PlanKernel) -> int:
        """Of keys, values and mask, what an attention is given and its list of tiles leaves out."""
        tiles = -(-self._capacity // _TILE)
        # Two counts come before the tiles.
        if not any(tensor.dtype == "Int32" and tensor.dims[-1:] == (tiles + 2,) for tensor in kernel.inputs):
            return 0
        given = sum(self._tensor_bytes(tensor) for tensor in kernel.inputs if self._capacity in tensor.dims)
        return given * (self._capacity - self._listed_rows) // self._capacity

    def cached_bytes(self, largest: int) -> int:
        """What does not reach memory if a kernel finds in a cache what the one before it left, ``largest`` bytes of a
        tensor at most."""
        saved = 0
        for kernel, following in pairwise(self._kernels):
            read = {tensor.name for tensor in following.inputs}
            for tensor in _distinct(kernel.outputs):
                count = 0 if _is_pool(tensor) else self._tensor_bytes(tensor)
                if tensor.name in read and count <= largest:
                    saved += count * (1 + (len(self._readers[tensor.name]) == 1))
        return saved

    def _tensor_bytes(self, tensor: KernelTensor) -> int:
        return self._volume(tensor) * _BITS[tensor.dtype] // 8

    def _volume(self, tensor: KernelTensor) -> int:
        tensor = self._written.get(tensor.name, tensor)  # a reader may see it in another shape
        if -1 not in tensor.dims:
            return prod(tensor.dims)
        if tensor.name in self._shapes:
            return prod(self._shapes[tensor.name])
        # Whole numbers and booleans that kernels hand on are the builder's bookkeeping, no values of the graph.
        if tensor.name in self._writer and tensor.dtype in _REAL_TYPES:
            made = self._values(self._produces, [self._writer[tensor.name]])
            used = self._values(self._reads, self._readers[tensor.name])
            known = prod(size for size in tensor.dims if size > 0)
            shapes = [[self._shapes[name] for name in names] for names in (made & used, made, used)]
            alike = [[_broadcast_volume(shape, tensor.dims) for shape in choice] for choice in shapes]
            reshaped = [[prod(shape) for shape in choice if prod(shape) % known == 0] for choice in shapes]
            for volumes in (*alike, *reshaped):
                if found := [volume for volume in volumes if volume]:
                    return min(found)
        self.unresolved += 1
        return 0

    def _values(self, values: dict[str, list[str]], kernels: list[PlanKernel]) -> set[str]:
        """Of the values that the kernels' nodes make or use, those that one kernel may hand to another."""
        names = {name for kernel in kernels for source in kernel.sources for name in values.get(source, ())}
        return {name for name in names & self._made if name in self._shapes}


def _broadcast_volume(shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
    """Elements of a tensor of ``dims``, some of them open, that holds a value of that shape, once for all along a
    dimension of 1; 0 if it cannot."""
    if len(shape) != len(dims) or any(dim not in (-1, 1, size) for size, dim in zip(shape, dims, strict=True)):
        return 0
    return prod(size for size, dim in zip(shape, dims, strict=True) if dim != 1)


def _shapes(graph: onnx.ModelProto, dims: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Of every value of the graph for the given sizes of its dynamic dimensions."""
    closed = onnx.ModelProto()
    closed.CopyFrom(graph)
    for value in (*closed.graph.input, *closed.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                size = dims[dim.dim_param]
                dim.Clear()
                dim.dim_value = size
    # Inference does not follow a size through a Slice of the pool or through a Range.
    if any(value.name == "window_rows" for value in closed.graph.input):
        closed.graph.initializer.append(numpy_helper.from_array(np.array([dims["window"]], np.int64), "closed_window"))
        for node in closed.graph.node:
            if node.op_type == "Slice" and node.input[0].startswith(("k_cache_out.", "v_cache_out.")):
                node.input[2] = "closed_window"
    given = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in closed.graph.input}
    makers = {result: node for node in closed.graph.node for result in node.output}
    for node in [node for node in closed.graph.node if node.op_type == "Range"]:
        size = makers[makers[node.input[1]].input[0]]  # 0, 1, ... to a size of one of the inputs
        first = next(attribute.i for attribute in size.attribute if attribute.name == "start")
        numbers = np.arange(given[size.input[0]][first])
        closed.graph.initializer.append(numpy_helper.from_array(numbers, node.output[0]))
        closed.graph.node.remove(node)
    inferred = onnx.shape_inference.infer_shapes(closed, data_prop=True).graph
    shapes = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in value.type.tensor_type.shape.dim]
        if all(sizes):
            shapes[value.name] = tuple(sizes)
    for node in inferred.node:
        if node.op_type == "DequantizeLinear":  # no kernel hands a matrix on
            shapes.pop(node.output[0], None)
    return shapes


def _operators(kernel: PlanKernel) -> set[str]:
    """ONNX operators of the nodes that a kernel computes: ``layers.3/MatMul_7`` is a MatMul."""
    return {source.rpartition("/")[2].rpartition("_")[0] for source in kernel.sources}


def _layer_of(kernel: PlanKernel) -> int | None:
    """The layer of a kernel's first node: a kernel that spans two ends the earlier one."""
    layers = [
        int(source.split("/")[0].removeprefix("layers.")) for source in kernel.sources if source.startswith("layers.")
    ]
    return min(layers, default=None)


def _reads_int4(kernel: PlanKernel) -> bool:
    return any(tensor.dtype == "Int4" for tensor in kernel.constants)


def _is_pool(tensor: KernelTensor) -> bool:
    return tensor.name.startswith(("k_cache", "v_cache", "k_view", "v_view"))


def _distinct(tensors: Iterable[KernelTensor]) -> Iterable[KernelTensor]:
    return {tensor.name: tensor for tensor in tensors}.values()
