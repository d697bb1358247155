"""Count the kernels of compiled plans and the bytes that each moves on a GPU. No GPU is needed.

The kernels come from the builder's list (:mod:`trimode.build.rtx.kernel_list`), in which dynamic dimensions are -1.
Their sizes for one shape of pass come from shape inference on the graph that the plan was compiled from: a tensor
between two kernels is a value of the graph, possibly reshaped.

Counting rules:

- A kernel reads each of its inputs and constants once and writes each output once. Caches are ignored.
- A lookup reads only the rows that it looks up, and a slice only the rows that it keeps.
- A write to the KV pool moves only the step's rows: the builder gives it the same tensor as input and output.
- Fused attention over the whole pool gets a list of the tiles of 64 rows in which the mask is not empty. It reads only
  these tiles of keys, values and mask.
- A tensor with a dynamic dimension that fits no value of the graph is not counted. ``unresolved`` is the number of
  these tensors; most belong to the builder's handling of masks.

Two more totals bound this count. In the upper one, attention reads the whole pool that it is given. In the lower one, a
tensor of at most half the L2 cache that one kernel writes and the next kernel reads is read from the cache; if no later
kernel reads it, it is not written to memory either.
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
from onnx import helper, numpy_helper

from trimode.build.graph.raw_pool import merged_matrices
from trimode.build.pass_audit import PassAudit, kv_pool_bytes, least_work
from trimode.build.roofline import GpuModel
from trimode.build.rtx.kernel_list import KernelList, KernelTensor, PlanKernel
from trimode.common.records import read_json_record
from trimode.engine.files import rank_folder, verify_file
from trimode.engine.manifest import Manifest
from trimode.engine.targets.rtx import GRAPH, KERNELS, RtxSection
from trimode.model.config import ModelConfig
from trimode.model.shards import Shard
from trimode.model.step import ENGINES, cache_outputs

Kind = Literal[
    "int4 product",
    "product",
    "dequantisation",
    "attention",
    "KV write",
    "KV copy",
    "exchange",
    "mask",
    "head",
    "element-wise",
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
_TILE = 64  # KV rows in a tile of the fused attention


class PlanPass(PassAudit):
    """lone_dequantisations: kernels that only dequantise. kv_copies: kernels that copy keys or values.
    ratio_whole_pool, ratio_with_cache: bytes / bound for the two bounding totals of this module. unresolved: tensors
    that were not counted.
    """

    lone_dequantisations: int
    kv_copies: int
    ratio_whole_pool: float
    ratio_with_cache: float
    unresolved: int

    def cells(self) -> dict[str, str]:
        return super().cells() | {
            "whole": f"{self.ratio_whole_pool:.3f}",
            "cache": f"{self.ratio_with_cache:.3f}",
            "alone": str(self.lone_dequantisations),
            "copies": str(self.kv_copies),
            "not counted": str(self.unresolved),
        }


@dataclass(frozen=True)
class Plan:
    """What an audit reads of one engine of an engine directory."""

    engine: str
    manifest: Manifest
    model: ModelConfig  # of a rank, if there are several
    kernels: tuple[PlanKernel, ...]
    graph: onnx.ModelProto


class PlanAudit:
    """Both plans of an engine directory; see :func:`read_plans`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._section = manifest.section(RtxSection)
        self.sms = self._section.sms
        self.candidates = manifest.limits.top_k
        self._plans = {plan.engine: plan for plan in read_plans(folder)}

    def count(self, engine: str, batch: int, step: int, window: int, gpu: GpuModel) -> PlanPass:
        return audit_pass(self._plans[engine], batch, step, window, gpu.cache)

    def memory(self) -> dict[str, int]:
        plans = self._section.ar, self._section.diffusion
        # Bytes between two runs of the pool are a constant of one plan that the other plan lacks.
        private = [
            following.plan_offset - splice.plan_offset
            for plan in plans
            for splice, following in zip(plan.splices, plan.splices[1:], strict=False)
        ]
        return {
            "weights of both plans": sum(splice.bytes for splice in plans[0].splices),
            "weights of one plan": sum(private),
            "KV pool": kv_pool_bytes(self.manifest),
        }

    def notes(self) -> list[str]:
        return [
            "whole: /bound if attention reads the whole pool; cache: /bound if each kernel reads the previous one's "
            "results from the L2 cache; alone: kernels that only dequantise; copies: of keys and values; not counted: "
            "tensors internal to the builder"
        ]


def read_plans(folder: Path) -> list[Plan]:
    """Both plans of an engine directory for target rtx, of rank 0 if it has several; the others differ in their weights
    only. Raises TriModeError if a file that is read was changed after the build.
    """
    manifest = Manifest.read(folder)
    plans = []
    for entry in manifest.files:
        if entry.path.endswith((KERNELS, GRAPH)):
            verify_file(folder, entry)
    of_rank = folder / rank_folder(0, manifest.ranks)
    for name, _ in ENGINES:
        kernels = read_json_record(KernelList, of_rank / name / KERNELS).root
        graph = onnx.load(of_rank / name / GRAPH, load_external_data=False)
        plans.append(Plan(name, manifest, Shard(0, manifest.ranks).config(manifest.model), kernels, graph))
    return plans


def audit_pass(plan: Plan, batch: int, step: int, window: int, cache_bytes: int = 0) -> PlanPass:
    """Count a pass of ``step`` tokens for each of ``batch`` sequences over ``window`` KV rows, with logits for every
    token. cache_bytes: size of the GPU's L2 cache.
    """
    sizes = _Sizes(plan, batch, step, window)
    unlisted = 0
    by_kind: Counter[Kind] = Counter()
    kinds: Counter[Kind] = Counter()
    layers: defaultdict[int, int] = defaultdict(int)
    for kernel in sizes.kernels:
        kind = kind_of(kernel)
        kinds[kind] += 1
        by_kind[kind] += sizes.bytes_of(kernel)
        unlisted += sizes.unlisted_bytes(kernel)
        if (layer := _layer_of(kernel)) is not None:
            layers[layer] += 1
    config, manifest = plan.model, plan.manifest
    bound, flops = least_work(manifest, plan.engine, batch, step, window, manifest.limits.top_k)
    total = sum(by_kind.values())
    return PlanPass(
        engine=plan.engine,
        batch=batch,
        step=step,
        window=window,
        kernels=len(sizes.kernels),
        kernels_a_layer=mode(layers.values()),
        int4_products=sum(_reads_int4(kernel) and "MatMul" in _operators(kernel) for kernel in sizes.kernels),
        int4_matrices=sum(manifest.precision.all_int4(modules) for modules in merged_matrices(config)),
        lone_dequantisations=kinds["dequantisation"],
        kv_copies=kinds["KV copy"],
        bytes=total,
        bound=bound,
        ratio=total / bound,
        ratio_whole_pool=(total + unlisted) / bound,
        ratio_with_cache=(total - sizes.cached_bytes(cache_bytes // 2)) / bound,
        flops=flops,
        bytes_by_kind={kind: count for kind, count in by_kind.most_common() if count},
        exchanges=kinds["exchange"],
        link_bytes=(manifest.ranks - 1) * sum(map(sizes.sent_bytes, sizes.kernels)),
        unresolved=sizes.unresolved,
    )


def kind_of(kernel: PlanKernel) -> Kind:
    operators = _operators(kernel)
    if kernel.kind.startswith("comm_"):
        return "exchange"
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


class _Sizes:
    """The bytes of a plan's tensors for one shape of pass, without token masks and asked ids.

    kernels: those that run; kernels of empty tensors do not.
    """

    def __init__(self, plan: Plan, batch: int, step: int, window: int) -> None:
        config = plan.model
        rank = plan.manifest.adapter.rank if plan.manifest.adapter else 0
        dims = {
            "batch": batch,
            "step": step,
            "rows": step,
            "window": window,
            "rank": rank,
            "masked_rows": 0,
            "asked": 0,
        }
        self._tokens = batch * step
        self._vocab_size = plan.manifest.model.vocab_size  # of the embedding, which every rank has all of
        self._kv_row = config.kv_width  # elements of one token's keys; its values have as many
        self._window = batch * window * config.kv_width
        self._capacity = plan.manifest.limits.capacity
        self._listed_rows = min(-(-window // _TILE) * _TILE, self._capacity)
        layers = config.num_hidden_layers
        self._shapes = _shapes(plan.graph, dims)
        idle = _optional_nodes(plan.graph)
        self.kernels = tuple(kernel for kernel in plan.kernels if not idle & set(kernel.sources))
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
            elif not writes_pool:  # a KV write does not read the pool
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

    def sent_bytes(self, kernel: PlanKernel) -> int:
        """Bytes of this rank's partial sum, if ranks exchange theirs in this kernel. Each of the others receives it."""
        if kind_of(kernel) != "exchange":
            return 0
        return sum(self._tensor_bytes(tensor) for tensor in _distinct(kernel.inputs))

    def unlisted_bytes(self, kernel: PlanKernel) -> int:
        """Bytes of keys, values and mask in the tiles that an attention's list leaves out."""
        tiles = -(-self._capacity // _TILE)
        # The list begins with two counts.
        if not any(tensor.dtype == "Int32" and tensor.dims[-1:] == (tiles + 2,) for tensor in kernel.inputs):
            return 0
        given = sum(self._tensor_bytes(tensor) for tensor in kernel.inputs if self._capacity in tensor.dims)
        return given * (self._capacity - self._listed_rows) // self._capacity

    def cached_bytes(self, largest: int) -> int:
        """Bytes that a cache saves if each kernel reads from it what the previous kernel wrote. largest: bytes of the
        largest tensor that the cache keeps."""
        saved = 0
        for kernel, following in pairwise(self.kernels):
            read = {tensor.name for tensor in following.inputs}
            for tensor in _distinct(kernel.outputs):
                count = 0 if _is_pool(tensor) else self._tensor_bytes(tensor)
                if tensor.name in read and count <= largest:
                    saved += count * (1 + (len(self._readers[tensor.name]) == 1))
        return saved

    def _tensor_bytes(self, tensor: KernelTensor) -> int:
        return self._volume(tensor) * _BITS[tensor.dtype] // 8

    def _volume(self, tensor: KernelTensor) -> int:
        tensor = self._written.get(tensor.name, tensor)  # a reader may list it with another shape
        if -1 not in tensor.dims:
            return prod(tensor.dims)
        if tensor.name in self._shapes:
            return prod(self._shapes[tensor.name])
        # Integer and boolean tensors between kernels are internal to the builder. They are not values of the graph.
        if tensor.name in self._writer and tensor.dtype in _REAL_TYPES:
            made = self._values(self._produces, [self._writer[tensor.name]])
            used = self._values(self._reads, self._readers[tensor.name])
            known = prod(size for size in tensor.dims if size > 0)
            shapes = [[self._shapes[name] for name in names] for names in (made & used, made, used)]
            same_rank = [[_broadcast_volume(shape, tensor.dims) for shape in choice] for choice in shapes]
            reshaped = [[prod(shape) for shape in choice if prod(shape) % known == 0] for choice in shapes]
            for volumes in (*same_rank, *reshaped):
                if found := [volume for volume in volumes if volume]:
                    return min(found)
        self.unresolved += 1
        return 0

    def _values(self, values: dict[str, list[str]], kernels: list[PlanKernel]) -> set[str]:
        """The values that the kernels' nodes produce or read and that can pass from one kernel to another."""
        names = {name for kernel in kernels for source in kernel.sources for name in values.get(source, ())}
        return {name for name in names & self._made if name in self._shapes}


def _broadcast_volume(shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
    """Elements of a tensor of ``dims`` that holds a value of ``shape``; 0 if it cannot. A dimension of -1 is unknown. A
    dimension of 1 is broadcast."""
    if len(shape) != len(dims) or any(dim not in (-1, 1, size) for size, dim in zip(shape, dims, strict=True)):
        return 0
    return prod(size for size, dim in zip(shape, dims, strict=True) if dim != 1)


def _optional_nodes(graph: onnx.ModelProto) -> set[str]:
    """Nodes that depend on the token mask or the asked ids. Their tensors are empty in a pass without them."""
    optional, names = {"token_mask", "asked_ids"}, set()
    for node in graph.graph.node:
        if optional & set(node.input):
            optional |= set(node.output)
            names.add(node.name)
    return names


def _shapes(graph: onnx.ModelProto, dims: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the graph's values. dims: sizes of the dynamic dimensions, by name."""
    closed = onnx.ModelProto()
    closed.CopyFrom(graph)
    for value in (*closed.graph.input, *closed.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                size = dims[dim.dim_param]
                dim.Clear()
                dim.dim_value = size
    # Shape inference cannot compute the result of a Slice of the pool or of a Range, so both get constant sizes here.
    if any(value.name == "window_rows" for value in closed.graph.input):
        closed.graph.initializer.append(numpy_helper.from_array(np.array([dims["window"]], np.int64), "closed_window"))
        for node in closed.graph.node:
            if node.op_type == "Slice" and node.input[0].startswith(("k_cache_out.", "v_cache_out.")):
                node.input[2] = "closed_window"
    given = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in closed.graph.input}
    makers = {result: node for node in closed.graph.node for result in node.output}
    for node in [node for node in closed.graph.node if node.op_type == "Range"]:
        size = makers[makers[node.input[1]].input[0]]  # the Shape of an input, which limits the range
        first = next(attribute.i for attribute in size.attribute if attribute.name == "start")
        numbers = np.arange(given[size.input[0]][first])
        closed.graph.initializer.append(numpy_helper.from_array(numbers, node.output[0]))
        closed.graph.node.remove(node)
    for node in closed.graph.node:  # not an ONNX operator; its result has the parts of all ranks
        if node.op_type == "DistCollective":
            ranks = next(attribute.i for attribute in node.attribute if attribute.name == "nb_rank")
            node.CopyFrom(helper.make_node("Concat", [node.input[0]] * ranks, node.output, name=node.name, axis=0))
    inferred = onnx.shape_inference.infer_shapes(closed, data_prop=True).graph
    shapes = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in value.type.tensor_type.shape.dim]
        if all(sizes):
            shapes[value.name] = tuple(sizes)
    for node in inferred.node:
        if node.op_type == "DequantizeLinear":  # a dequantised matrix never passes from one kernel to another
            shapes.pop(node.output[0], None)
    return shapes


def _operators(kernel: PlanKernel) -> set[str]:
    """The ONNX operators that a kernel computes, from names of nodes such as ``layers.3/MatMul_7``."""
    return {source.rpartition("/")[2].rpartition("_")[0] for source in kernel.sources}


def _layer_of(kernel: PlanKernel) -> int | None:
    """The lowest layer among a kernel's nodes."""
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
