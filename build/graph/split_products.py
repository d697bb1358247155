"""The counters that a graph's launches share: split int4 products, and other launches whose last program sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnx import TensorProto

from trimode.build.graph.onnx_builder import ModelBuilder
from trimode.build.graph.raw_pool import PooledLinear
from trimode.model.step import COUNTERS
from trimode.plugins.operators import Int4Product
from trimode.plugins.operators.int4_product import split_count


class SplitProducts:
    """Declares the graph's input ``counters`` and output ``counters_out`` if a launch needs them. Each of these
    launches gets the counters of the one before it, so that each value has one reader.

    linears: the matrices that products of the graph read, each once. others: the counters that other launches need, by
    name.
    """

    def __init__(
        self, graph: ModelBuilder, linears: Iterable[PooledLinear], others: Mapping[str, int] | None = None
    ) -> None:
        split, others = [linear for linear in linears if _is_split(linear)], others or {}
        self._remaining = {*others, *(linear.weight.name for linear in split)}
        self._counters = COUNTERS
        if self._remaining:
            columns = (linear.scale.shape[1] for linear in split if linear.scale is not None)
            size = [max((*others.values(), *map(Int4Product.counters, columns)))]
            graph.input(COUNTERS, TensorProto.INT32, size)
            graph.output("counters_out", TensorProto.INT32, size)

    def counters(self, linear: PooledLinear) -> tuple[str, str] | None:
        """The counters before and after this product; None if it is not split."""
        return self.next(linear.weight.name) if linear.weight.name in self._remaining else None

    def next(self, launch: str) -> tuple[str, str]:
        """The counters before and after this launch."""
        self._remaining.remove(launch)
        before = self._counters
        self._counters = f"{launch}.counters" if self._remaining else "counters_out"
        return before, self._counters


def _is_split(linear: PooledLinear) -> bool:
    if linear.scale is None:
        return False
    groups, columns = linear.scale.shape
    return split_count(groups * linear.group, columns, linear.group) > 1
