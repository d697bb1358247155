"""Builders of ONNX graphs and functions: a node for each call, literals as constants.

A method that makes a value returns its name. Numbers among a node's inputs become constants: an int is an int64 scalar,
a list of ints an int64 vector, a float an fp32 scalar.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trimode.build.graph.raw_pool import PoolRange
from trimode.plugins.operators import DOMAIN, Operator

OPSET = 24
IR_VERSION = 11

Shape = Sequence[int | str]
Input = str | int | float | list[int]
Branch = Callable[[], Sequence[tuple[str, int]]]


class NodeBuilder(ABC):
    """Collects nodes. ``scope`` is a prefix of their names, by which compilers report the sources of their kernels."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.scope = ""
        self._made = 0  # nodes, branches included

    def op(self, kind: str, *inputs: Input, **attributes: object) -> str:
        """Add a node with one result."""
        names = self._names(inputs)
        result = f"{kind}_{self._made}"
        self._add(kind, names, [result], **attributes)
        return result

    def node(self, kind: str, inputs: Sequence[Input], results: Sequence[str], **attributes: object) -> None:
        """Add a node whose results are named by the caller."""
        self._add(kind, self._names(inputs), results, **attributes)

    def choose(self, condition: str, results: Sequence[str], then: Branch, otherwise: Branch) -> None:
        """Add a node that computes one of two branches. A branch adds nodes, and returns its results: names and
        element types.
        """
        branches = {"then_branch": self._branch(then), "else_branch": self._branch(otherwise)}
        self.node("If", [condition], results, **branches)

    def _branch(self, branch: Branch) -> onnx.GraphProto:
        outside, self.nodes = self.nodes, []
        results = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in branch()]
        inside, self.nodes = self.nodes, outside
        return helper.make_graph(inside, f"branch_{self._made}", [], results)

    def dims(self, x: str, start: int, end: int) -> str:
        """A part of the shape of ``x``."""
        return self.op("Shape", x, start=start, end=end)

    @abstractmethod
    def constant(self, array: NDArray[np.generic], name: str) -> str:
        """A small constant. Constants of one name are equal."""

    def _names(self, inputs: Sequence[Input]) -> list[str]:
        return [value if isinstance(value, str) else self._literal(value) for value in inputs]

    def _literal(self, value: float | list[int]) -> str:
        if isinstance(value, list):
            return self.constant(np.array(value, np.int64), "ints_" + "_".join(map(str, value)))
        dtype = np.int64 if isinstance(value, int) else np.float32
        return self.constant(np.array(value, dtype), f"{'int' if isinstance(value, int) else 'float'}_{value}")

    def _add(self, kind: str, inputs: list[str], results: Sequence[str], **attributes: object) -> None:
        name = f"{self.scope}{kind}_{self._made}"
        self._made += 1
        self.nodes.append(helper.make_node(kind, inputs, list(results), name=name, **attributes))


class FunctionBuilder(NodeBuilder):
    """The function of an operator: its inputs and outputs are values of these names.

    attributes: names of further attributes that its nodes may have, which the body ignores.
    """

    def __init__(self, operator: Operator, attributes: Sequence[str]) -> None:
        super().__init__()
        self._operator = operator
        self._attributes = attributes

    def constant(self, array: NDArray[np.generic], name: str) -> str:  # noqa: ARG002 - a function has no initializers
        return self.op("Constant", value=numpy_helper.from_array(array))

    def function(self) -> onnx.FunctionProto:
        return helper.make_function(
            DOMAIN,
            self._operator.name,
            [operand.name for operand in self._operator.inputs],
            [operand.name for operand in self._operator.outputs],
            self.nodes,
            [helper.make_opsetid("", OPSET)],
            attributes=[*self._attributes, *self._operator.attributes],
        )


class ModelBuilder(NodeBuilder):
    """A model of one graph. Matrices are in the weight pool.

    pool_file: the name of the pool's file, which then holds initializers; None makes them inputs of the graph.
    """

    def __init__(self, name: str, pool_file: str | None) -> None:
        super().__init__()
        self._name = name
        self._pool_file = pool_file
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._functions: dict[str, onnx.FunctionProto] = {}
        self._pooled_inputs: set[str] = set()

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Shape) -> None:
        """Declare the value of this name as a result of the graph."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def call(
        self, function: onnx.FunctionProto, inputs: Sequence[str], results: Sequence[str], **attributes: object
    ) -> None:
        """Add a node of the plugins' domain; ``function`` defines what it computes."""
        self._functions[function.name] = function
        self.node(function.name, inputs, results, domain=DOMAIN, **attributes)

    def constant(self, array: NDArray[np.generic], name: str) -> str:
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def pooled(self, entry: PoolRange) -> str:
        """A constant that is stored in the weight pool."""
        if self._pool_file is None:
            return self._pooled_input(entry)
        if entry.name not in self._initializers:
            tensor = TensorProto(name=entry.name, data_type=entry.dtype, dims=entry.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", self._pool_file), ("offset", entry.offset), ("length", entry.length)):
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[entry.name] = tensor
        return entry.name

    def _pooled_input(self, entry: PoolRange) -> str:
        """An input for the constant. int4 matrices are inputs of bytes, since programs cannot bind int4 inputs."""
        if entry.name not in self._pooled_inputs:
            self._pooled_inputs.add(entry.name)
            if entry.dtype == TensorProto.INT4:
                self.input(entry.name, TensorProto.INT8, [*entry.shape[:-1], entry.shape[-1] // 2])
            else:
                self.input(entry.name, entry.dtype, entry.shape)
        return entry.name

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, self._name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), *([helper.make_opsetid(DOMAIN, 1)] if self._functions else [])]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="trimode",
            functions=list(self._functions.values()),
        )
