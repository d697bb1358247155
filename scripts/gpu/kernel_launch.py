"""One launch of an operator's kernel with its tensors, for the interpreter or the CUDA driver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trimode.plugins.operators import Constants, Node, Operator, Tactic

_TYPES = {"fp32": torch.float32, "int64": torch.int64, "bool": torch.bool, "int8": torch.int8}


class KernelLaunch(NamedTuple):
    """arguments: tensors and scalars by name, in the kernel's order. constants: with the tactic's. outputs: in the
    operator's order.
    """

    operator: Operator
    node: Node
    tactic: Tactic
    grid: tuple[int, int, int]
    constants: Constants
    arguments: dict[str, Tensor | int]
    outputs: tuple[Tensor, ...]


def node_of(inputs: Mapping[str, Tensor], attributes: Mapping[str, int] | None = None) -> Node:
    return Node.of({name: tuple(tensor.shape) for name, tensor in inputs.items()}, attributes)


def prepare(
    operator: Operator, inputs: Mapping[str, Tensor], tactic: Tactic, attributes: Mapping[str, int] | None = None
) -> KernelLaunch:
    """A launch. Its outputs are filled with NaN, except that an aliased output is the tensor of its input."""
    node = node_of(inputs, attributes)
    first = inputs[operator.inputs[0].name]
    outputs = tuple(
        inputs[operand.aliases]
        if operand.aliases
        else torch.full(shape, float("nan"), dtype=_TYPES.get(operand.type, first.dtype), device=first.device)
        for operand, shape in zip(operator.outputs, operator.output_shapes(node), strict=True)
    )
    ordered = [*(inputs[operand.name] for operand in operator.inputs), *operator.scalar_values(node), *outputs]
    return KernelLaunch(
        operator,
        node,
        tactic,
        operator.grid(node, tactic),
        {**operator.constants(node), **tactic.constants},
        dict(zip(operator.parameters, ordered, strict=True)),
        outputs,
    )
