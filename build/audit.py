"""What the compiled plans will do on a GPU, kernel by kernel and byte by byte, told without one.

The kernels are the builder's own list (:mod:`trimode.build.kernels`). It leaves dynamic dimensions open; they are
closed for one shape of pass at a time by the graph that the plan was compiled from: a tensor between two kernels is a
value between the graph's nodes that those kernels compute, maybe reshaped.

Counting rules. A kernel reads each of its inputs and constants once and writes each output once, whatever the caches
do. A lookup reads the rows it looks up, a slice the rows it keeps, and a write to the KV pool touches the step's rows
alone, since the builder gives it the same tensor as input and output. Where no graph value fits a tensor's open
dimensions (the bookkeeping of the masks, mostly), it is left out and counted in ``unresolved``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import mode
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper
from pydantic import BaseModel

from trimode.build.kernels import Kernel, KernelList, KernelTensor
from trimode.build.roofline import Precision, Shape, floor_bytes, floor_flops
from trimode.model.errors import TriModeError
from trimode.model.manifest import GRAPH, KERNELS, Manifest, RtxEntry, verify_file
from trimode.model.records import read_json_record
from trimode.model.step import ENGINES

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
_MATRICES_A_LAYER = 4  # qkv, o, gate_up, down


class PassAudit(BaseModel):
    """One pass of one engine. Bytes are of device memory; ``kernels_a_layer``: of most layers."""

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
    flops: int
    bytes_by_kind: dict[str, int]
    unresolved: int


@dataclass(frozen=True)
class Plan:
    """One engine of an engine directory, as far as an audit reads it."""

    engine: str
    manifest: Manifest
    rtx: RtxEntry
    kernels: tuple[Kernel, ...]
    graph: onnx.ModelProto


def read_plans(folder: Path) -> list[Plan]:
    """Both plans of an engine directory; raises TriModeError if it is not of target rtx, or what is read was
    changed after the build.
    """
    manifest = Manifest.read(folder)
    if manifest.rtx is None:
        raise TriModeError(f"{folder} is for target {manifest.target}; an audit reads the kernels of target rtx")
    plans = []
    for entry in manifest.files:
        if entry.path.endswith((KERNELS, GRAPH)):
            verify_file(folder, entry)
    for name, _ in ENGINES:
        kernels = read_json_record(KernelList, folder / name / KERNELS).root
        plans.append(
            Plan(name, manifest, manifest.rtx, kernels, onnx.load(folder / name / GRAPH, load_external_data=False))
        )
    return plans


def audit_pass(plan: Plan, batch: int, step: int, window: int) -> PassAudit:
    """Count a pass of ``step`` tokens a sequence, logits for all of them, over ``window`` KV rows."""
    _refuse_impossible(plan, batch, step, window)
    sizes = _Sizes(plan, batch, step, window)
    by_kind: Counter[Kind] = Counter()
    kinds: Counter[Kind] = Counter()
    layers: defaultdict[int, int] = defaultdict(int)
    for kernel in plan.kernels:
        kind = kind_of(kernel)
        kinds[kind] += 1
        by_kind[kind] += sizes.bytes_of(kernel)
        if (layer := _layer_of(kernel)) is not None:
            layers[layer] += 1
    config, precision = plan.manifest.model, plan.manifest.precision
    shape = Shape(
        batch,
        step,
        window,
        step,
        plan.manifest.limits.top_k,
        plan.manifest.adapter.rank if plan.manifest.adapter and plan.engine == "diffusion" else 0,
    )
    layer_bits, head_bits = (4 if stored == "int4" else 16 for stored in (precision.linear, precision.head))
    bits = Precision(layer_bits, head_bits, precision.group or 0)
    floor, total = floor_bytes(config, shape, bits), sum(by_kind.values())
    int4_head = precision.head == "int4"
    return PassAudit(
        engine=plan.engine,
        batch=batch,
        step=step,
        window=window,
        kernels=len(plan.kernels),
        kernels_a_layer=mode(layers.values()),
        int4_products=sum(_reads_int4(kernel) and "MatMul" in _operators(kernel) for kernel in plan.kernels),
        int4_matrices=(precision.linear == "int4") * _MATRICES_A_LAYER * config.num_hidden_layers + int4_head,
        lone_dequantisations=kinds["dequantisation"],
        kv_copies=kinds["KV copy"],
        bytes=total,
        floor=floor,
        ratio=total / floor,
        flops=floor_flops(config, shape),
        bytes_by_kind={kind: count for kind, count in by_kind.most_common() if count},
        unresolved=sizes.unresolved,
    )


def cycle_bytes_to_host(manifest: Manifest, block_length: int) -> int:
    """Of one request's self-speculation cycle: candidates and log-sum-exp of the draft's masked rows and of the
    verification's rows."""
    a_row = manifest.limits.top_k * (4 + 8) + 4
    return a_row * (block_length - 1 + block_length)


def kind_of(kernel: Kernel) -> Kind:
    operators = _operators(kernel)
    if "Attention" in operators and kernel.name.startswith("_gemm_mha"):
        return "attention"
    if "DequantizeLinear" in operators:
        return "int4 product" if "MatMul" in operators else "dequantisation"
    if any("adapter_" in tensor.name for tensor in kernel.inputs) or kernel.kind == "gemm":
        return "product"
    if "TensorScatter" in operators and len(kernel.inputs) > 1:
        return "KV write"
    if any(_is_cache(tensor) for tensor in kernel.inputs):
        return "KV copy"
    if any(source.startswith("head/") for source in kernel.sources):
        return "head"
    if not kernel.sources or operators & {"LessOrEqual", "Less", "GatherElements", "And"}:
        return "mask"
    return "element-wise"


def _refuse_impossible(plan: Plan, batch: int, step: int, window: int) -> None:
    limits = {
        "batch": (batch, plan.rtx.max_batch),
        "step": (step, plan.rtx.max_step),
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
        self._dims = {"batch": batch, "step": step, "window": window, "rows": step, "rank": rank}
        self._tokens = batch * step
        self._vocab_size = config.vocab_size
        self._kv_row = config.kv_width  # elements of one of K and V, a token
        self._window = batch * window * config.kv_width
        self._volumes = _volumes(plan.graph, self._dims)
        self._produces = {node.name: list(node.output) for node in plan.graph.graph.node}
        self._reads = {node.name: set(node.input) for node in plan.graph.graph.node}
        self._writer: dict[str, Kernel] = {}
        self._readers: defaultdict[str, list[Kernel]] = defaultdict(list)
        for kernel in plan.kernels:
            for tensor in kernel.outputs:
                self._writer[tensor.name] = kernel
            for tensor in kernel.inputs:
                self._readers[tensor.name].append(kernel)
        self.unresolved = 0

    def bytes_of(self, kernel: Kernel) -> int:
        operators = _operators(kernel)
        moved = 0
        for tensor in {tensor.name: tensor for tensor in kernel.inputs}.values():
            if _is_cache(tensor):
                moved += self._cache_bytes(kernel, tensor)
            else:
                moved += self._tensor_bytes(tensor)
        for tensor in kernel.constants:
            if "Gather" in operators and tensor.dims[:1] == (self._vocab_size,):
                moved += self._tokens * prod(tensor.dims[1:]) * _BITS[tensor.dtype] // 8
            else:
                moved += self._tensor_bytes(tensor)
        for tensor in {tensor.name: tensor for tensor in kernel.outputs}.values():
            if not (_is_cache(tensor) and "TensorScatter" in operators and len(kernel.inputs) > 1):
                moved += self._tensor_bytes(tensor)
        return moved

    def _cache_bytes(self, kernel: Kernel, tensor: KernelTensor) -> int:
        bits = _BITS[tensor.dtype]
        if kind_of(kernel) == "KV write":  # what it writes; of the cache it reads nothing
            return self._tokens * self._kv_row * bits // 8
        if "Slice" in _operators(kernel):
            return self._window * bits // 8
        return self._tensor_bytes(tensor)

    def _tensor_bytes(self, tensor: KernelTensor) -> int:
        return self._volume(tensor) * _BITS[tensor.dtype] // 8

    def _volume(self, tensor: KernelTensor) -> int:
        if -1 not in tensor.dims:
            return prod(tensor.dims) * (self._dims["batch"] if _is_cache(tensor) else 1)
        if tensor.name in self._volumes:
            return self._volumes[tensor.name]
        known = prod(size for size in tensor.dims if size > 0)
        candidates = self._between(tensor)
        fitting = {volume for volume in candidates if volume % known == 0}
        if not fitting:
            self.unresolved += 1
            return 0
        return min(fitting)

    def _between(self, tensor: KernelTensor) -> set[int]:
        """Volumes of the graph's values that the tensor may be: those that its writer's nodes make, if possible such
        as its readers' nodes use."""
        writer = self._writer.get(tensor.name)
        if writer is None:
            return set()
        made = {value for source in writer.sources for value in self._produces.get(source, ())}
        used = {
            value
            for reader in self._readers[tensor.name]
            for source in reader.sources
            for value in self._reads.get(source, ())
        }
        values = made & used or made
        return {self._volumes[value] for value in values if value in self._volumes}


def _volumes(graph: onnx.ModelProto, dims: dict[str, int]) -> dict[str, int]:
    """Elements of every value of the graph for the given sizes of its dynamic dimensions."""
    closed = onnx.ModelProto()
    closed.CopyFrom(graph)
    for value in (*closed.graph.input, *closed.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                size = dims[dim.dim_param]
                dim.Clear()
                dim.dim_value = size
    # Inference does not follow a size through a Slice.
    closed.graph.initializer.append(numpy_helper.from_array(np.array([dims["window"]], np.int64), "closed_window"))
    for node in closed.graph.node:
        if node.op_type == "Slice":
            node.input[2] = "closed_window"
    inferred = onnx.shape_inference.infer_shapes(closed, data_prop=True).graph
    volumes = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in value.type.tensor_type.shape.dim]
        if all(sizes):
            volumes[value.name] = prod(sizes)
    return volumes


def _operators(kernel: Kernel) -> set[str]:
    """ONNX operators of the nodes that a kernel computes: ``layers.3/MatMul_7`` is a MatMul."""
    return {source.rpartition("/")[2].rpartition("_")[0] for source in kernel.sources}


def _layer_of(kernel: Kernel) -> int | None:
    """The layer of a kernel's first node: a kernel that spans two ends the earlier one."""
    layers = [
        int(source.split("/")[0].removeprefix("layers.")) for source in kernel.sources if source.startswith("layers.")
    ]
    return min(layers, default=None)


def _reads_int4(kernel: Kernel) -> bool:
    return any(tensor.dtype == "Int4" for tensor in kernel.constants)


def _is_cache(tensor: KernelTensor) -> bool:
    return "_cache" in tensor.name
