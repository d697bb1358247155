"""How each operator is launched, told from the shapes of its inputs: the shapes of its outputs, the constants that its
kernel is compiled with, the tactics that fit, the grid and the scalars.

A dimension is an integer, or a compiler's symbol where it is known at run time only. What kernels are compiled for must
be integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from trimode.plugins.contracts import (
    ATTEND_TACTICS,
    INT4_PRODUCT_TACTICS,
    KV_WRITE,
    KV_WRITE_TACTICS,
    MERGE,
    MERGE_TACTICS,
    AttentionShape,
    Constants,
    Dim,
    Operator,
    Pattern,
    ProductShape,
    Tactic,
    attend,
    attend_constants,
    attend_grid,
    int4_product,
    int4_product_constants,
    int4_product_grid,
    kv_write_constants,
    kv_write_grid,
    merge_constants,
    merge_grid,
    split_count,
    within_group,
)

Shapes = Mapping[str, Sequence[Dim]]


class Call(NamedTuple):
    """One use of an operator. static: its inputs' shapes by name, with integers where a dimension is fixed. shapes: all
    dimensions as the caller's symbols. attributes: the node's. symbol: an integer as such a symbol.
    """

    static: Shapes
    attributes: Mapping[str, int]
    shapes: Shapes
    symbol: Callable[[int], Dim] = int


@dataclass(frozen=True)
class Launch(ABC):
    operator: Operator

    @abstractmethod
    def outputs(self, call: Call, /) -> list[tuple[Dim, ...]]: ...

    @abstractmethod
    def constants(self, call: Call, /) -> Constants: ...

    @abstractmethod
    def tactics(self, call: Call, /) -> dict[int, Tactic]:
        """Those that fit the shape, by number from 1."""

    @abstractmethod
    def grid(self, call: Call, tactic: Tactic, /) -> tuple[Dim, Dim, Dim]: ...

    @abstractmethod
    def scalars(self, call: Call, /) -> tuple[Dim, ...]: ...


class _KvWrite(Launch):
    def outputs(self, call: Call, /) -> list[tuple[Dim, ...]]:
        batch, step, width = call.shapes["qkv"]
        cache = tuple(call.shapes["k_cache"])
        return [(batch, width // cache[3] - cache[1] * 2, step, cache[3]), cache, cache]

    def constants(self, call: Call, /) -> Constants:
        _, kv_heads, _, head_dim = call.static["k_cache"]
        group = (call.static["qkv"][2] // head_dim - 2 * kv_heads) // kv_heads
        return kv_write_constants(AttentionShape(kv_heads, group, head_dim, splits=1))

    def tactics(self, _call: Call, /) -> dict[int, Tactic]:
        return dict(enumerate(KV_WRITE_TACTICS, 1))

    def grid(self, call: Call, _tactic: Tactic, /) -> tuple[Dim, Dim, Dim]:
        batch, step, _ = call.shapes["qkv"]
        return kv_write_grid(batch, step)

    def scalars(self, call: Call, /) -> tuple[Dim, ...]:
        return call.shapes["qkv"][1], call.shapes["k_cache"][2]


class _Attend(Launch):
    def outputs(self, call: Call, /) -> list[tuple[Dim, ...]]:
        batch, heads, step, head_dim = call.shapes["q"]
        parts = split_count(call.symbol(call.attributes["splits"]), step)
        return [(batch, parts, heads, step, head_dim), (batch, parts, heads, step)]

    def constants(self, call: Call, /) -> Constants:
        return attend_constants(self._shape(call))

    def tactics(self, _call: Call, /) -> dict[int, Tactic]:
        return dict(enumerate(ATTEND_TACTICS, 1))

    def grid(self, call: Call, tactic: Tactic, /) -> tuple[Dim, Dim, Dim]:
        batch, _, step, _ = call.shapes["q"]
        return attend_grid(self._shape(call), tactic, batch, step)

    def scalars(self, call: Call, /) -> tuple[Dim, ...]:
        return call.shapes["q"][2], call.shapes["k_cache"][2]

    @staticmethod
    def _shape(call: Call) -> AttentionShape:
        (_, heads, _, head_dim), kv_heads = call.static["q"], call.static["k_cache"][1]
        return AttentionShape(kv_heads, heads // kv_heads, head_dim, call.symbol(call.attributes["splits"]))


class _Merge(Launch):
    def outputs(self, call: Call, /) -> list[tuple[Dim, ...]]:
        batch, _, heads, step, head_dim = call.shapes["partial"]
        return [(batch, step, heads * head_dim)]

    def constants(self, call: Call, /) -> Constants:
        return merge_constants(self._shape(call))

    def tactics(self, _call: Call, /) -> dict[int, Tactic]:
        return dict(enumerate(MERGE_TACTICS, 1))

    def grid(self, call: Call, _tactic: Tactic, /) -> tuple[Dim, Dim, Dim]:
        batch, _, _, step, _ = call.shapes["partial"]
        return merge_grid(self._shape(call), batch, step)

    def scalars(self, call: Call, /) -> tuple[Dim, ...]:
        return call.shapes["partial"][3], call.shapes["partial"][1]

    @staticmethod
    def _shape(call: Call) -> AttentionShape:
        (_, _, heads, _, head_dim), group = call.static["partial"], call.attributes["group"]
        return AttentionShape(heads // group, group, head_dim, call.attributes["splits"])


class _Int4Product(Launch):
    """The rows of ``x``, ``narrow``, ``residual`` and ``y`` may be spread over several dimensions."""

    def outputs(self, call: Call, /) -> list[tuple[Dim, ...]]:
        return [(*list(call.shapes["x"])[:-1], call.shapes["scale"][1])]

    def constants(self, call: Call, /) -> Constants:
        return int4_product_constants(self._shape(call))

    def tactics(self, call: Call, /) -> dict[int, Tactic]:
        group = self._shape(call).group
        return {number: within_group(tactic, group) for number, tactic in enumerate(INT4_PRODUCT_TACTICS, 1)}

    def grid(self, call: Call, tactic: Tactic, /) -> tuple[Dim, Dim, Dim]:
        return int4_product_grid(self._shape(call), tactic, *self.scalars(call))

    def scalars(self, call: Call, /) -> tuple[Dim, ...]:
        first, *others = list(call.shapes["x"])[:-1]
        for dimension in others:
            first = first * dimension
        return (first,)

    @staticmethod
    def _shape(call: Call) -> ProductShape:
        static = call.static
        groups, columns = static["scale"]
        inner = static["packed"][0]
        return ProductShape(
            inner,
            columns,
            inner // groups,
            input_scale="input_scale" in static,
            rank=static["adapter_up"][0] if "adapter_up" in static else 0,
            residual="residual" in static,
        )


def _launches() -> list[Launch]:
    patterns: tuple[Pattern, ...] = ("causal", "bidirectional", "masked")
    # What a product's operator takes is told by which terms there are, not by their sizes.
    products = [
        ProductShape(inner=128, columns=2, input_scale=scaled, rank=adapted, residual=added)
        for scaled, adapted, added in product((False, True), (0, 1), (False, True))
    ]
    return [
        _KvWrite(KV_WRITE),
        *(_Attend(attend(pattern)) for pattern in patterns),
        _Merge(MERGE),
        *(_Int4Product(int4_product(shape)) for shape in products),
    ]


LAUNCHES: dict[str, Launch] = {launch.operator.name: launch for launch in _launches()}
