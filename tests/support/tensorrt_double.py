"""A double of TensorRT's parser and builder. It reads the emitted graph and queries each plugin, through the classes of
the real bindings, for its shapes and a kernel for every tactic. Its plan is the hash of the graph and the profiles, for
:mod:`tests.support.tensorrt_runtime_double`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest

from tests.support.plugin_builder import INPUTS, Built, Input, build
from trimode.engine.files import hash_file
from trimode.plugins.operators import DOMAIN, OPERATORS
from trimode.plugins.operators.int4_product import WORD

BATCH, STEP = 2, 40
SIZES = {"batch": BATCH, "step": STEP, "rows": 7}


def one_tactic_each(patch: pytest.MonkeyPatch) -> None:
    """Use only each operator's first tactic: compiling all of them takes half a minute, and tests/plugins does it."""
    for operator in {type(operator) for operator in OPERATORS.values()}:
        patch.setattr(operator, "TACTICS", operator.TACTICS[:1])


class TensorrtDouble:
    """plugins: the results of each plugin node, in order. profiles: of each engine, with the shapes of its inputs.
    expanded: operators whose plugins the parser does not find, so that it uses their functions.
    """

    def __init__(self, trt: ModuleType, patch: pytest.MonkeyPatch) -> None:
        self._trt = trt
        self.expanded: set[str] = set()
        self.plugins: list[tuple[str, Built]] = []
        self.profiles: list[list[dict[str, tuple[Any, ...]]]] = []
        self.previews: list[str] = []
        patch.setattr(trt, "Builder", lambda _log: self)
        patch.setattr(trt, "OnnxParser", lambda network, _log: SimpleNamespace(parse_from_file=network.parse))
        patch.setattr(trt, "LayerType", SimpleNamespace(PLUGIN_V3="plugin"))

    def create_network(self, flags: int) -> _Network:
        assert flags & 1 << int(self._trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
        return _Network(self._trt, self.expanded)

    def create_builder_config(self) -> Any:
        config = SimpleNamespace(profiling_verbosity=None, progress_monitor=None)
        config.set_preview_feature = lambda feature, on: self.previews.append(feature.name) if on else None
        self.profiles.append(profiles := [])
        config.add_optimization_profile = lambda profile: profiles.append(profile.shapes)
        return config

    def create_optimization_profile(self) -> Any:
        profile = SimpleNamespace(shapes={})
        profile.set_shape = lambda name, *shapes: profile.shapes.update({name: shapes})
        return profile

    def build_serialized_network(self, network: _Network, config: Any) -> bytes | None:
        config.progress_monitor.phase_start("plugins", None, len(network.plugins))
        made: dict[str, tuple[int, ...]] = {}
        for step, node in enumerate(network.plugins):
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            wanted = {name: attributes[name] for name in OPERATORS[node.op_type].attributes}
            built = build(self._trt, node.op_type, network.inputs_of(node, made), wanted)
            made |= dict(zip(node.output, built.output_shapes, strict=True))
            self.plugins.append((node.op_type, built))
            if not config.progress_monitor.step_complete("plugins", step):
                return None
        config.progress_monitor.phase_finish("plugins")
        return json.dumps({"graph": network.graph, "profiles": self.profiles[-1]}).encode()


class _Network:
    def __init__(self, trt: ModuleType, expanded: set[str]) -> None:
        self._trt = trt
        self._expanded = expanded
        self.plugins: list[onnx.NodeProto] = []

    def parse(self, path: str) -> bool:
        """Like TensorRT's parser: a node becomes the plugin of its name, namespace and version."""
        model, self.graph = onnx.load(path), hash_file(Path(path))
        shaped = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self._values = {value.name: value for value in (*shaped.input, *shaped.value_info, *shaped.output)}
        self._inputs = list(model.graph.input)
        for node in model.graph.node:
            if node.domain == DOMAIN and node.op_type not in self._expanded:
                stated = {attribute.name: attribute.s.decode() for attribute in node.attribute if attribute.s}
                registry = self._trt.get_plugin_registry()
                registry.get_creator(node.op_type, stated["plugin_version"], stated["plugin_namespace"])
                self.plugins.append(node)
        return True

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> Any:
        value = self._inputs[index]
        dims = value.type.tensor_type.shape.dim
        tensor = SimpleNamespace(name=value.name, shape=[-1 if dim.dim_param else dim.dim_value for dim in dims])
        tensor.get_dimension_name = lambda at: dims[at].dim_param
        return tensor

    @property
    def num_layers(self) -> int:
        return len(self.plugins)

    def get_layer(self, _index: int) -> Any:
        return SimpleNamespace(type="plugin")

    def inputs_of(self, node: onnx.NodeProto, made: dict[str, tuple[int, ...]]) -> dict[str, Input]:
        """Each input with its size in some pass. made: shapes of the outputs of earlier plugins."""
        operands = [operand.name for operand in OPERATORS[node.op_type].inputs]
        shapes = {
            operand: made.get(name) or self._shape(name) for operand, name in zip(operands, node.input, strict=True)
        }
        # Rows of activations; the weights give their width.
        if "packed" in shapes:
            _, units, _, words = shapes["packed"]
            shapes["x"] = (BATCH, STEP, units * words * WORD)
        for operand, weight, axis in (("residual", "scale", 1), ("narrow", "adapter_up", 0)):
            if operand in shapes:
                shapes[operand] = (BATCH, STEP, shapes[weight][axis])
        return {operand: (INPUTS[operand][0], shape, INPUTS[operand][2]) for operand, shape in shapes.items()}

    def _shape(self, name: str) -> tuple[int, ...]:
        dims = self._values[name].type.tensor_type.shape.dim
        return tuple(dim.dim_value or SIZES.get(dim.dim_param, 1) for dim in dims)
