"""The cos and sin of a step's rotary angles, once for all layers."""

from __future__ import annotations

from typing import ClassVar

from trimode.plugins.operators.operator import Constants, Dim, Node, Operand, Operator, Tactic, numbered

_ROTATION = ("B", "S", "D / 2")


class Rotations(Operator):
    """cos and sin of float32(position) * frequency, an fp32 product, multiplied by a scale in fp32.

    The keys' scale is ``key_scale``. The queries' is ``query_scales[min(position // length, T - 1)]`` and includes the
    softmax's. Attribute ``length``: tokens of the original context. Positions are not negative.
    """

    name = "Rotations"
    kernel = "rotations.rotations_kernel"
    inputs = (
        Operand("position_ids", "int64", ("B", "S")),
        Operand("frequencies", "fp32", ("D / 2",)),
        Operand("key_scale", "fp32", ("1",)),
        Operand("query_scales", "fp32", ("T",)),
    )
    scalars = ()
    outputs = (
        Operand("query_cos", "real", _ROTATION),
        Operand("query_sin", "real", _ROTATION),
        Operand("key_cos", "real", _ROTATION),
        Operand("key_sin", "real", _ROTATION),
    )
    attributes = ("length",)

    TACTICS: ClassVar[tuple[Tactic, ...]] = (Tactic({}, warps=1, stages=1),)

    @staticmethod
    def node(*, batch: int, step: int, head_dim: int, scales: int, length: int) -> Node:
        shapes = {
            "position_ids": (batch, step),
            "frequencies": (head_dim // 2,),
            "key_scale": (1,),
            "query_scales": (scales,),
        }
        return Node.of(shapes, {"length": length})

    def constants(self, node: Node) -> Constants:
        return {
            "HALF": node.fixed["frequencies"][0],
            "SCALES": node.fixed["query_scales"][0],
            "LENGTH": node.attributes["length"],
        }

    def tactics(self, _node: Node) -> dict[int, Tactic]:
        return numbered(self.TACTICS)

    def grid(self, node: Node, _tactic: Tactic) -> tuple[Dim, Dim, Dim]:
        """A program for each token."""
        batch, step = node.shapes["position_ids"]
        return batch * step, 1, 1

    def scalar_values(self, _node: Node) -> tuple[Dim, ...]:
        return ()

    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]:
        return [(*node.shapes["position_ids"], node.shapes["frequencies"][0])] * 4
