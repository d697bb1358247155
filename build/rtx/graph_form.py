"""The graph as TensorRT takes it best, and the order that its kernels must keep.

ONNX has no words for two things that TensorRT's fused attention makes use of, so a copy of the graph says them, for the
parser alone:

- It takes keys as columns, [heads, head_dim, rows], whose elements lie as rows do. An input said to be rows is copied
  into that first; one said to be columns, in the format HWC8 (an image's channels innermost), is read where it is. Both
  are the same bytes.
- A mask that is the same for every query need not be spread over them, as ONNX Runtime wants it.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trimode.build.rtx.kernel_list import PlanKernel
from trimode.model.step import cache_outputs, cache_views

KEY_HEADS = "key_heads"  # batch * KV heads


def tensorrt_form(graph: onnx.ModelProto, layers: int) -> onnx.ModelProto:
    """A copy of the graph whose ``k_view.i`` are [batch * KV heads, head_dim, rows, 1], to be read in HWC8, and whose
    diffusion mask is [batch, 1, 1, rows].
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for name in cache_views(layers)[::2]:
        _declare_columns(copy.graph, name)
    _spread_no_mask(copy.graph)
    return copy


def _declare_columns(graph: onnx.GraphProto, name: str) -> None:
    view = next(value for value in graph.input if value.name == name)
    _, heads, rows, head_dim = (dim.dim_value for dim in view.type.tensor_type.shape.dim)
    view.CopyFrom(helper.make_tensor_value_info(name, view.type.tensor_type.elem_type, [KEY_HEADS, head_dim, rows, 1]))
    shape = numpy_helper.from_array(np.array([-1, heads, head_dim, rows], np.int64), f"{name}.shape")
    graph.initializer.append(shape)
    reader = next(node for node in graph.node if name in node.input)
    reader.input[list(reader.input).index(name)] = f"{name}.rows"
    columns = helper.make_node("Reshape", [name, shape.name], [f"{name}.columns"], name=f"{reader.name}.columns")
    turned = helper.make_node(
        "Transpose", [f"{name}.columns"], [f"{name}.rows"], name=f"{reader.name}.rows", perm=[0, 1, 3, 2]
    )
    graph.node.insert(0, turned)
    graph.node.insert(0, columns)


def _spread_no_mask(graph: onnx.GraphProto) -> None:
    makers = {result: node for node in graph.node for result in node.output}
    masks = {node.input[3] for node in graph.node if node.op_type == "Attention"}
    for mask in (makers[name] for name in masks):
        spread = makers[mask.input[0]]
        if spread.op_type == "Expand":
            mask.input[0] = spread.input[0]
            graph.node.remove(spread)


def refuse_disorder(kernels: tuple[PlanKernel, ...], layers: int) -> None:
    """Raise RuntimeError unless every kernel that reads a view needs, by way of other tensors, results of the kernels
    that write its layer's keys and values: nothing else makes it wait for them.
    """
    writers: defaultdict[str, list[PlanKernel]] = defaultdict(list)
    for kernel in kernels:
        for tensor in kernel.outputs:
            writers[tensor.name].append(kernel)
    written = dict(zip(cache_views(layers), cache_outputs(layers), strict=True))
    read = set()
    for kernel in kernels:
        views = {tensor.name for tensor in kernel.inputs} & written.keys()
        awaited = {tensor.name for earlier in _needed(kernel, writers) for tensor in earlier.outputs}
        for view in views:
            if written[view] not in awaited:
                raise RuntimeError(f"kernel {kernel.name} reads {view} but does not wait for {written[view]}")
        read |= views
    if missing := written.keys() - read:
        raise RuntimeError(f"no kernel reads {', '.join(sorted(missing))}")


def _needed(kernel: PlanKernel, writers: dict[str, list[PlanKernel]]) -> list[PlanKernel]:
    """Every kernel whose results are needed before this one."""
    needed: dict[str, PlanKernel] = {}
    waiting = [kernel]
    while waiting:
        for tensor in waiting.pop().inputs:
            for writer in writers.get(tensor.name, ()):
                if writer.name not in needed:
                    needed[writer.name] = writer
                    waiting.append(writer)
    return list(needed.values())
