"""The launches of one pass: every tensor's shape, and each operator with the node it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from trimode.engine.launch_list import Condition, Launch, LaunchList
from trimode.plugins.operators import OPERATORS, Node, Operator

Sizes = tuple[int, ...]


class PassShape(NamedTuple):
    """The sizes of a pass. top_k: candidates of a row. masked: whether the pass has a token mask. asked: asked ids of
    a row, 0 for none.
    """

    batch: int
    step: int
    rows: int
    capacity: int
    top_k: int
    masked: bool
    asked: int

    def makes(self, when: Condition) -> bool:
        """Whether the pass makes launches with this condition."""
        return {
            "always": True,
            "masked": self.masked,
            "unmasked": not self.masked,
        }[when]

    @property
    def symbols(self) -> dict[str, int]:
        return {
            "batch": self.batch,
            "step": self.step,
            "rows": self.rows,
            "capacity": self.capacity,
            "top_k": self.top_k,
            "asked": self.asked,
        }


class PlannedLaunch(NamedTuple):
    """inputs, outputs: the names of its tensors. shapes: of the outputs."""

    operator: Operator
    node: Node
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[Sizes, ...]

    def new_outputs(self) -> Iterator[tuple[str, Sizes, str]]:
        """Name, shape and element type of the outputs that do not alias an input."""
        for name, shape, operand in zip(self.outputs, self.shapes, self.operator.outputs, strict=True):
            if operand.aliases is None:
                yield name, shape, operand.type


def plan_pass(launches: LaunchList, shape: PassShape) -> list[PlannedLaunch]:
    """The launches of a pass of this shape, in order."""
    symbols = shape.symbols
    shapes: dict[str, Sizes] = {tensor.name: tensor.sizes(symbols) for tensor in (*launches.inputs, *launches.weights)}
    planned = []
    for launch in launches.launches:
        if shape.makes(launch.when):
            planned.append(_planned(launch, shapes, launch.values(symbols)))
            shapes |= dict(zip(launch.outputs, planned[-1].shapes, strict=True))
    return planned


def _planned(launch: Launch, shapes: Mapping[str, Sizes], attributes: dict[str, int]) -> PlannedLaunch:
    operator = OPERATORS[launch.operator]
    names = (operand.name for operand in operator.inputs)
    node = Node.of({name: shapes[given] for name, given in zip(names, launch.inputs, strict=True)}, attributes)
    outputs = tuple(tuple(map(int, shape)) for shape in operator.output_shapes(node))
    return PlannedLaunch(operator, node, launch.inputs, launch.outputs, outputs)
