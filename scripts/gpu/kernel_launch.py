"""One launch of an operator's kernel with its tensors, for the interpreter or the CUDA driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimode.plugins.operators import Constants, Node, Operator, Tactic

_TYPES = {
    "fp32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
    "int8": torch.int8,
}


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


def tile_name(tactic: Tactic) -> str:
    """Of a product: ``64 x 128, 4 warps``, with ``steps`` if it is for steps only."""
    steps = ", steps" if "STEPS" in tactic.constants else ""
    return f"{tactic.constants['BLOCK_M']} x {tactic.constants['BLOCK_N']}, {tactic.warps} warps{steps}"


def node_of(inputs: Mapping[str, Tensor], attributes: Mapping[str, int] | None = None) -> Node:
    return Node.of({name: tuple(tensor.shape) for name, tensor in inputs.items()}, attributes)


def prepare(
    operator: Operator,
    inputs: Mapping[str, Tensor],
    tactic: Tactic,
    attributes: Mapping[str, int] | None = None,
    real: torch.dtype = torch.float32,
) -> KernelLaunch:
    """A launch. Its outputs are filled with NaN, or the lowest integer, except that an aliased output is the tensor of
    its input.

    real: type of the activations, for an operator without an input of this type.
    """
    node = node_of(inputs, attributes)
    device = inputs[operator.inputs[0].name].device
    real = next((inputs[operand.name].dtype for operand in operator.inputs if operand.type == "real"), real)
    outputs = tuple(
        inputs[operand.aliases] if operand.aliases else _unwritten(shape, _TYPES.get(operand.type, real), device)
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


def _unwritten(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    lowest = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(tuple(shape), lowest, dtype=dtype, device=device)
