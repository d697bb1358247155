"""A thin layer over ONNX's protobufs: nodes by call, small constants inside the graph, matrices in the weight pool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trimode.build.graph.raw_pool import PoolRange
from trimode.plugins.operators import DOMAIN

OPSET = 24
IR_VERSION = 11

Shape = Sequence[int | str]


class OnnxGraph:
    """Collects the nodes of one graph; every method that makes a value returns its name.

    pool_file: where the pooled constants lie; without one they are inputs of the graph.
    """

    def __init__(self, name: str, pool_file: str | None) -> None:
        self._name = name
        self._pool_file = pool_file
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._functions: dict[str, onnx.FunctionProto] = {}
        self._pooled_inputs: set[str] = set()
        # Goes before the names of nodes: compilers report their kernels' sources by them.
        self.scope = ""

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Shape) -> None:
        """Declare a value, made under this very name, as a result of the graph."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """A node with one result."""
        result = f"{kind}_{len(self._nodes)}"
        self.node(kind, inputs, [result], **attributes)
        return result

    def node(self, kind: str, inputs: Sequence[str], results: Sequence[str], **attributes: object) -> None:
        """A node whose results are named by the caller."""
        name = f"{self.scope}{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), list(results), name=name, **attributes))

    def call(
        self, function: onnx.FunctionProto, inputs: Sequence[str], results: Sequence[str], **attributes: object
    ) -> None:
        """A node of the plugins' domain, whose meaning ``function`` is."""
        self._functions[function.name] = function
        self.node(function.name, inputs, results, domain=DOMAIN, **attributes)

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def constant(self, name: str, array: NDArray[np.generic]) -> str:
        """A small constant, kept inside the graph; the same name is made once."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def pooled(self, entry: PoolRange) -> str:
        """A constant that lies in the weight pool."""
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
        """int4 matrices come as bytes: the type of a graph's input must be one that programs can name."""
        if entry.name not in self._pooled_inputs:
            self._pooled_inputs.add(entry.name)
            if entry.dtype == TensorProto.INT4:
                self.input(entry.name, TensorProto.INT8, [*entry.shape[:-1], entry.shape[-1] // 2])
            else:
                self.input(entry.name, entry.dtype, entry.shape)
        return entry.name

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), *([helper.make_opsetid(DOMAIN, 1)] if self._functions else [])]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="trimode",
            functions=list(self._functions.values()),
        )
