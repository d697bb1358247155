"""How a plan reads the KV pool where it lies: the layout that keys are declared in, and the order that its kernels keep.

TensorRT's fused attention takes keys as columns, [heads, head_dim, rows], whose elements lie as rows do. An input said
to be [batch, KV heads, rows, head_dim] is first copied into that; one said to be columns whose elements lie along the
rows is read where it is. Both are the same bytes.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trimode.build.kernels import Kernel
from trimode.model.step import cache_outputs, cache_views

KEY_HEADS = "key_heads"  # batch * KV heads


def declare_keys_as_columns(graph: onnx.ModelProto, layers: int) -> onnx.ModelProto:
    """A copy of the graph whose ``k_view.i`` are [batch * KV heads, head_dim, rows, 1]: what TensorRT is given to parse.
    In its format HWC8, the channels of an image innermost, their elements lie as the pool's do.
    """
    columns = onnx.ModelProto()
    columns.CopyFrom(graph)
    inputs = {value.name: value for value in columns.graph.input}
    for name in cache_views(layers)[::2]:
        view = inputs[name]
        _, heads, rows, head_dim = (dim.dim_value for dim in view.type.tensor_type.shape.dim)
        readers = [node for node in columns.graph.node if name in node.input]
        split, turned = f"{name}.split", f"{name}.rows"
        shape = numpy_helper.from_array(np.array([-1, heads, head_dim, rows], np.int64), f"{name}.shape")
        columns.graph.initializer.append(shape)
        nodes = (
            helper.make_node("Reshape", [name, shape.name], [split], name=f"{readers[0].name}/{split}"),
            helper.make_node("Transpose", [split], [turned], name=f"{readers[0].name}/{turned}", perm=[0, 1, 3, 2]),
        )
        for offset, node in enumerate(nodes):
            columns.graph.node.insert(offset, node)
        for node in readers:
            node.input[list(node.input).index(name)] = turned
        kind = view.type.tensor_type.elem_type
        view.CopyFrom(helper.make_tensor_value_info(name, kind, [KEY_HEADS, head_dim, rows, 1]))
    return columns


def refuse_disorder(kernels: tuple[Kernel, ...], layers: int) -> None:
    """Raise RuntimeError unless every kernel that reads a view needs a result of the kernels that write its layer's
    rows: nothing else would make one wait for the other.
    """
    writers: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for tensor in kernel.outputs:
            writers.setdefault(tensor.name, []).append(kernel)
    for index in range(layers):
        views = cache_views(layers)[2 * index : 2 * index + 2]
        caches = cache_outputs(layers)[2 * index : 2 * index + 2]
        for reader in kernels:
            if not any(tensor.name in views for tensor in reader.inputs):
                continue
            needed = _ancestors(reader, writers)
            for cache in caches:
                if not any(kernel.name in needed for kernel in writers.get(cache, ())):
                    raise RuntimeError(f"kernel {reader.name} does not wait for {cache}, whose memory it reads")


def _ancestors(kernel: Kernel, writers: dict[str, list[Kernel]]) -> set[str]:
    found: set[str] = set()
    waiting = [kernel]
    while waiting:
        for tensor in waiting.pop().inputs:
            for writer in writers.get(tensor.name, ()):
                if writer.name not in found:
                    found.add(writer.name)
                    waiting.append(writer)
    return found
