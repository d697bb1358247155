"""How each operator is launched, told from the shapes of its inputs: the shapes of its outputs, the constants that its
kernel is compiled with, the tactics that fit, the grid and the scalars.

Shapes are integers, or a compiler's symbols where a dimension is known at run time only; ``Shapes`` has those of an
operator's inputs by name. What kernels are compiled for must be integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

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
)

Shapes = Mapping[str, Sequence[Dim]]
Attributes = Mapping[str, int]
# An integer as a symbol of the compiler that computes the shapes.
Symbol = Callable[[int], Dim]


class Launch(Protocol):
    """``static``: the inputs' shapes with integers where a dimension is fixed; ``shapes``: all of them as symbols."""

    operator: Operator

    def outputs(self, shapes: Shapes, attributes: Attributes, symbol: Symbol) -> list[tuple[Dim, ...]]: ...

    def constants(self, static: Shapes, attributes: Attributes) -> Constants: ...

    def tactics(self, static: Shapes) -> dict[int, Tactic]:
        """Those that fit the shape, by number from 1."""
        ...

    def grid(
        self, static: Shapes, attributes: Attributes, tactic: Tactic, shapes: Shapes, symbol: Symbol
    ) -> tuple[Dim, Dim, Dim]: ...

    def scalars(self, shapes: Shapes) -> tuple[Dim, ...]: ...


@dataclass(frozen=True)
class _KvWrite:
    operator: Operator = KV_WRITE

    def outputs(self, shapes: Shapes, _attributes: Attributes, _symbol: Symbol) -> list[tuple[Dim, ...]]:
        batch, step, width = shapes["qkv"]
        cache = tuple(shapes["k_cache"])
        return [(batch, width // cache[3] - cache[1] * 2, step, cache[3]), cache, cache]

    def constants(self, static: Shapes, _attributes: Attributes) -> Constants:
        _, kv_heads, _, head_dim = static["k_cache"]
        group = (static["qkv"][2] // head_dim - 2 * kv_heads) // kv_heads
        return kv_write_constants(AttentionShape(kv_heads, group, head_dim, splits=1))

    def tactics(self, _static: Shapes) -> dict[int, Tactic]:
        return dict(enumerate(KV_WRITE_TACTICS, 1))

    def grid(
        self, _static: Shapes, _attributes: Attributes, _tactic: Tactic, shapes: Shapes, _symbol: Symbol
    ) -> tuple[Dim, Dim, Dim]:
        return kv_write_grid(shapes["qkv"][0], shapes["qkv"][1])

    def scalars(self, shapes: Shapes) -> tuple[Dim, ...]:
        return shapes["qkv"][1], shapes["k_cache"][2]


@dataclass(frozen=True)
class _Attend:
    operator: Operator

    def outputs(self, shapes: Shapes, attributes: Attributes, symbol: Symbol) -> list[tuple[Dim, ...]]:
        batch, heads, step, head_dim = shapes["q"]
        parts = split_count(symbol(attributes["splits"]), step)
        return [(batch, parts, heads, step, head_dim), (batch, parts, heads, step)]

    def constants(self, static: Shapes, attributes: Attributes) -> Constants:
        return attend_constants(self._shape(static, attributes["splits"]))

    def tactics(self, _static: Shapes) -> dict[int, Tactic]:
        return dict(enumerate(ATTEND_TACTICS, 1))

    def grid(
        self, static: Shapes, attributes: Attributes, tactic: Tactic, shapes: Shapes, symbol: Symbol
    ) -> tuple[Dim, Dim, Dim]:
        shape = self._shape(static, symbol(attributes["splits"]))
        return attend_grid(shape, tactic, shapes["q"][0], shapes["q"][2])

    def scalars(self, shapes: Shapes) -> tuple[Dim, ...]:
        return shapes["q"][2], shapes["k_cache"][2]

    @staticmethod
    def _shape(static: Shapes, splits: Dim) -> AttentionShape:
        (_, heads, _, head_dim), kv_heads = static["q"], static["k_cache"][1]
        return AttentionShape(kv_heads, heads // kv_heads, head_dim, splits)


@dataclass(frozen=True)
class _Merge:
    operator: Operator = MERGE

    def outputs(self, shapes: Shapes, _attributes: Attributes, _symbol: Symbol) -> list[tuple[Dim, ...]]:
        batch, _, heads, step, head_dim = shapes["partial"]
        return [(batch, step, heads * head_dim)]

    def constants(self, static: Shapes, attributes: Attributes) -> Constants:
        return merge_constants(self._shape(static, attributes))

    def tactics(self, _static: Shapes) -> dict[int, Tactic]:
        return dict(enumerate(MERGE_TACTICS, 1))

    def grid(
        self, static: Shapes, attributes: Attributes, _tactic: Tactic, shapes: Shapes, _symbol: Symbol
    ) -> tuple[Dim, Dim, Dim]:
        batch, _, _, step, _ = shapes["partial"]
        return merge_grid(self._shape(static, attributes), batch, step)

    def scalars(self, shapes: Shapes) -> tuple[Dim, ...]:
        return shapes["partial"][3], shapes["partial"][1]

    @staticmethod
    def _shape(static: Shapes, attributes: Attributes) -> AttentionShape:
        """Which heads share keys and values is past caring for."""
        _, _, heads, _, head_dim = static["partial"]
        return AttentionShape(kv_heads=heads, group=1, head_dim=head_dim, splits=attributes["splits"])


@dataclass(frozen=True)
class _Int4Product:
    """The rows of ``x``, ``narrow``, ``residual`` and ``y`` may be spread over several dimensions."""

    operator: Operator

    def outputs(self, shapes: Shapes, _attributes: Attributes, _symbol: Symbol) -> list[tuple[Dim, ...]]:
        return [(*list(shapes["x"])[:-1], shapes["scale"][1])]

    def constants(self, static: Shapes, _attributes: Attributes) -> Constants:
        return int4_product_constants(self._shape(static))

    def tactics(self, static: Shapes) -> dict[int, Tactic]:
        """A tile along the inner dimension lies in one group."""
        group = self._shape(static).group
        numbered = enumerate(INT4_PRODUCT_TACTICS, 1)
        return {number: tactic for number, tactic in numbered if group % int(tactic.constants["BLOCK_K"] or 1) == 0}

    def grid(
        self, static: Shapes, _attributes: Attributes, tactic: Tactic, shapes: Shapes, _symbol: Symbol
    ) -> tuple[Dim, Dim, Dim]:
        return int4_product_grid(self._shape(static), tactic, *self.scalars(shapes))

    def scalars(self, shapes: Shapes) -> tuple[Dim, ...]:
        first, *others = list(shapes["x"])[:-1]
        for dimension in others:
            first = first * dimension
        return (first,)

    def _shape(self, static: Shapes) -> ProductShape:
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
        _KvWrite(),
        *(_Attend(attend(pattern)) for pattern in patterns),
        _Merge(),
        *(_Int4Product(int4_product(shape)) for shape in products),
    ]


LAUNCHES: dict[str, Launch] = {launch.operator.name: launch for launch in _launches()}
