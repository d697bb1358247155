"""Adapt a graph to TensorRT's parser, and check the order of the compiled kernels.

TensorRT's fused attention avoids two copies if the graph is written differently. The parser gets a copy of the graph
with these changes:

- Keys are declared as columns, [heads, head_dim, rows], in the format HWC8 (channels innermost). In memory that is the
  same as rows of head_dim. TensorRT reads such an input in place; it would copy an input declared as rows.
- A mask that is the same for every query is not expanded over the queries. ONNX Runtime needs the expanded mask.
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
    """A copy of the graph whose ``k_view.i`` are [batch * KV heads, head_dim, rows, 1] in format HWC8, and whose
    bidirectional mask is [batch, 1, 1, rows].
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for name in cache_views(layers)[::2]:
        _declare_columns(copy.graph, name)
    _remove_mask_expansion(copy.graph)
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


def _remove_mask_expansion(graph: onnx.GraphProto) -> None:
    makers = {result: node for node in graph.node for result in node.output}
    masks = {node.input[3] for node in graph.node if node.op_type == "Attention"}
    for mask in (makers[name] for name in masks):
        expansion = makers[mask.input[0]]
        if expansion.op_type == "Expand":
            mask.input[0] = expansion.input[0]
            graph.node.remove(expansion)


def refuse_disorder(kernels: tuple[PlanKernel, ...], layers: int) -> None:
    """Raise RuntimeError unless every kernel that reads a view depends on the kernels that write its layer's keys and
    values, through a chain of tensors. TensorRT orders kernels by such dependencies only.
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
    """Every kernel that this one depends on, directly or indirectly."""
    needed: dict[str, PlanKernel] = {}
    waiting = [kernel]
    while waiting:
        for tensor in waiting.pop().inputs:
            for writer in writers.get(tensor.name, ()):
                if writer.name not in needed:
                    needed[writer.name] = writer
                    waiting.append(writer)
    return list(needed.values())
