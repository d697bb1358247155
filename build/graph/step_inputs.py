"""The inputs that every graph takes from the step contract (:mod:`trimode.model.step`)."""

from __future__ import annotations

from typing import NamedTuple

from onnx import TensorProto

from trimode.build.graph.onnx_builder import ModelBuilder
from trimode.model.config import ModelConfig
from trimode.model.step import AttentionPattern, adapter_inputs


class StepInputs(NamedTuple):
    """Names of inputs. visibility: ``block_mask`` in the AR graph, ``step_lengths`` in the diffusion graph."""

    input_ids: str
    position_ids: str
    write_indices: str
    visibility: str
    logit_rows: str


def declare_step(graph: ModelBuilder, pattern: AttentionPattern) -> StepInputs:
    return StepInputs(
        graph.input("input_ids", TensorProto.INT64, ["batch", "step"]),
        graph.input("position_ids", TensorProto.INT64, ["batch", "step"]),
        graph.input("write_indices", TensorProto.INT64, ["batch"]),
        graph.input("block_mask", TensorProto.BOOL, ["batch", "step", "step"])
        if pattern == "causal"
        else graph.input("step_lengths", TensorProto.INT64, ["batch"]),
        graph.input("logit_rows", TensorProto.INT64, ["batch", "rows"]),
    )


def declare_adapter(graph: ModelBuilder, config: ModelConfig, real: int, rank: int | str) -> str:
    """The draft adapter's matrices, and its scale, whose name is returned. real: ONNX's type of the activations."""
    scale = graph.input("adapter_scale", real, ["batch"])
    for index in range(config.num_hidden_layers):
        down, up = adapter_inputs(index)
        graph.input(down, real, [config.query_width, rank])
        graph.input(up, real, [rank, config.hidden_size])
    return scale
