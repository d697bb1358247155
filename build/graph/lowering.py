"""A graph of nodes of the domain ``trimode`` as a list of launches.

A node is one launch, except the head: without a token mask, a pass launches the head that takes none.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import TensorProto

from trimode.engine.launch_list import FORMAT_VERSION, Launch, LaunchList, LaunchTensor
from trimode.model.step import ElementType
from trimode.plugins.operators import DOMAIN, OPERATORS, Head

_TYPES: dict[int, ElementType] = {
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.INT8: "int8",
    TensorProto.BOOL: "bool",
}


def launch_list(graph: onnx.ModelProto, real: int, weights: Collection[str]) -> LaunchList:
    """real: ONNX's type of the activations. weights: names of the inputs that are ranges of the weight pool.

    Raises ValueError for a node of another domain, which no kernel computes.
    """
    tensors = [_tensor(value, real) for value in graph.graph.input]
    aliased = {node.output[at] for node in graph.graph.node for at in _aliases(node)}
    return LaunchList(
        format_version=FORMAT_VERSION,
        inputs=tuple(tensor for tensor in tensors if tensor.name not in weights),
        weights=tuple(tensor for tensor in tensors if tensor.name in weights),
        launches=tuple(launch for node in graph.graph.node for launch in _launches(node)),
        results=tuple(value.name for value in graph.graph.output if value.name not in aliased),
    )


def _launches(node: onnx.NodeProto) -> list[Launch]:
    if node.domain != DOMAIN:
        raise ValueError(f"{node.name} is a node of operator {node.op_type}, which has no kernel")
    operator = OPERATORS[node.op_type]
    # The number of candidates differs from pass to pass.
    attributes: dict[str, int | str] = {
        attribute.name: "top_k" if attribute.name == "top_k" else attribute.i
        for attribute in node.attribute
        if attribute.name in operator.attributes
    }
    launch = Launch(operator=node.op_type, inputs=tuple(node.input), outputs=tuple(node.output), attributes=attributes)
    if isinstance(operator, Head) and operator.masked:
        given = dict(zip((operand.name for operand in operator.inputs), launch.inputs, strict=True))
        inputs = tuple(given[operand.name] for operand in operator.unmasked.inputs)
        unmasked = {"operator": operator.unmasked.name, "inputs": inputs, "when": "unmasked"}
        return [launch.model_copy(update={"when": "masked"}), launch.model_copy(update=unmasked)]
    return [launch]


def _aliases(node: onnx.NodeProto) -> list[int]:
    """Places of the outputs that alias an input."""
    operator = OPERATORS.get(node.op_type)
    return [] if operator is None else [at for at, operand in enumerate(operator.outputs) if operand.aliases]


def _tensor(value: onnx.ValueInfoProto, real: int) -> LaunchTensor:
    """A tensor of the activations' type is ``real``, also where that is fp32."""
    tensor = value.type.tensor_type
    fixed: ElementType = "fp32" if tensor.elem_type == TensorProto.FLOAT else _TYPES.get(tensor.elem_type, "real")
    return LaunchTensor(
        name=value.name,
        type="real" if tensor.elem_type == real else fixed,
        shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim),
    )
