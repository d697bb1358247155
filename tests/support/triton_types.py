"""Make each type of Triton's interpreter once.

The interpreter makes the type and the shape of every intermediate tensor anew, and compares shapes as trees of Python
objects, which takes half of its time. A launch has few different types, and nothing changes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.language import core
from triton.runtime import interpreter


@contextmanager
def types_made_once() -> Iterator[None]:
    """For the kernels that are interpreted inside."""
    semantic = interpreter.interpreter_semantic
    make_type, make_tensor, broadcast = core.block_type.__init__, core.tensor.__init__, semantic.broadcast_impl_value
    # The attributes of block types, by their element type and lengths, and of their tensors. An element type is among
    # the attributes, so that no other one gets its id.
    types: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    scalar = (core.tuple([]), core.constexpr(1))

    def block_type(self: Any, element: Any, shape: Any) -> None:
        key = id(element), tuple(core._unwrap_if_constexpr(length) for length in shape)
        if key not in types:
            make_type(self, element, shape)
            lengths = core.tuple([core.constexpr(length) for length in self.shape])
            self.of_tensors = lengths, core.constexpr(self.numel)
            types[key] = self.__dict__
        self.__dict__ = types[key]

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = kind.of_tensors if kind.is_block() else scalar

    def broadcast_unless_equal(left: Any, right: Any) -> tuple[Any, Any]:
        one, other = left.type, right.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return left, right
        found: tuple[Any, Any] = broadcast(left, right)
        return found

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    semantic.broadcast_impl_value = broadcast_unless_equal
    try:
        yield
    finally:
        core.block_type.__init__, core.tensor.__init__ = make_type, make_tensor
        del semantic.broadcast_impl_value
