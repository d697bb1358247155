"""A graph cut at the sums of ranks: one model for the nodes before the first sum, one for those between two sums.

A node belongs to the first piece in which all its inputs are known. Each piece passes the values that later pieces
read on as outputs; the runtime keeps them by name.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import helper

from trimode.model.step import partial_sum, total_sum


def cut_at_sums(model: onnx.ModelProto, sums: int) -> list[onnx.ModelProto]:
    """``sums + 1`` models. model: with ``sums`` sums (:class:`trimode.build.graph.network.NetworkOptions`)."""
    if sums == 0:
        return [model]
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    piece_of = {value.name: 0 for value in graph.input}
    piece_of |= {total_sum(index): index + 1 for index in range(sums)}
    pieces: list[list[onnx.NodeProto]] = [[] for _ in range(sums + 1)]
    for node in graph.node:
        piece = max((piece_of[name] for name in _read(node) if name in piece_of), default=0)
        piece_of |= dict.fromkeys(node.output, piece)
        pieces[piece].append(node)
    for index in range(sums):
        if piece_of[partial_sum(index)] != index:
            raise RuntimeError(f"sum {index} does not follow the sum before it")
    kinds = _element_types(model)
    results, read_later, models = {value.name for value in graph.output}, set[str](), []
    for nodes in reversed(pieces):
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in _read(node)}
        inputs = sorted(read - made - constants.keys())
        outputs = sorted(made & (read_later | results))
        read_later |= read
        used = [tensor for name, tensor in constants.items() if name in read]
        described = [
            [helper.make_tensor_value_info(name, kinds[name], None) for name in names] for names in (inputs, outputs)
        ]
        models.append(
            helper.make_model(
                helper.make_graph(nodes, graph.name, *described, used),
                opset_imports=model.opset_import,
                ir_version=model.ir_version,
                producer_name=model.producer_name,
            )
        )
    return models[::-1]


def _read(node: onnx.NodeProto) -> set[str]:
    """The values from outside that a node reads, also within its branches."""
    names = {name for name in node.input if name}
    for branch in _branches(node):
        inside = {name for each in branch.node for name in each.output}
        names |= {name for each in branch.node for name in _read(each)} - inside
    return names


def _branches(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    return (attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH)


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {value.name: value.type.tensor_type.elem_type for value in values}
