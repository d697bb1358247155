"""The counters that a graph's split int4 products share."""

from __future__ import annotations

from onnx import TensorProto

from trimode.build.graph.onnx_builder import ModelBuilder
from trimode.build.graph.raw_pool import PooledLinear, RawPool
from trimode.model.step import COUNTERS
from trimode.plugins.operators import Int4Product
from trimode.plugins.operators.int4_product import split_count


class SplitProducts:
    """Declares the graph's input ``counters`` and output ``counters_out`` if a product of the pool is split. Each split
    product gets the counters of the one before it, so that each value has one reader. A graph uses each matrix once.
    """

    def __init__(self, graph: ModelBuilder, pool: RawPool) -> None:
        self._remaining = {linear.weight.name for linear in pool.linears() if _is_split(linear)}
        self._counters = COUNTERS
        if self._remaining:
            widest = max(linear.scale.shape[1] for linear in pool.linears() if linear.scale is not None)
            size = [Int4Product.counters(widest)]
            graph.input(COUNTERS, TensorProto.INT32, size)
            graph.output("counters_out", TensorProto.INT32, size)

    def counters(self, linear: PooledLinear) -> tuple[str, str] | None:
        """The counters before and after this product; None if it is not split."""
        if linear.weight.name not in self._remaining:
            return None
        self._remaining.remove(linear.weight.name)
        before = self._counters
        self._counters = f"{linear.weight.name}.counters" if self._remaining else "counters_out"
        return before, self._counters


def _is_split(linear: PooledLinear) -> bool:
    if linear.scale is None:
        return False
    groups, columns = linear.scale.shape
    return split_count(groups * linear.group, columns, linear.group) > 1
