"""The base of the operators of the ``trimode`` domain: operands, compile-time constants, tactics and launch.

An operator is one kernel. The kernel's parameters are, in this order: the operator's inputs, its scalars (32-bit
integers computed from shapes), its outputs, then the compile-time constants by name. A parameter of the kernel that the
operator does not have is compiled as None. A kernel may also take CAPABILITY, the compute capability (90 for 9.0), and
STAGES, the tactic's; the interpreter gives None. Tensors are contiguous; pointers are aligned to 16 bytes. Grids depend
on shapes only, never on lengths in device memory, so one CUDA graph serves all lengths.

Letters in shapes: B sequences, S tokens of the step, HQ query heads, HKV key-value heads, D head size, C rows of the KV
pool, P splits of the KV rows, M rows of a product (B S), K its inner size, N its columns, R the adapter's rank, H the
hidden size, I the intermediate size, V the vocabulary, L rows with logits of a sequence, T tiles of the vocabulary, k
candidates, A asked tokens.
Type ``real`` is the type of the activations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trimode.model.step import ElementType

Constants = dict[str, int]

# A dimension: an integer, or a compiler's symbol, which takes the operators + - * // with a symbol on the left.
Dim = Any
Shapes = Mapping[str, Sequence[Dim]]

DOMAIN = "trimode"


class Operand(NamedTuple):
    """``aliases``: the input whose memory an output shares."""

    name: str
    type: ElementType
    shape: tuple[str, ...]
    aliases: str | None = None


@dataclass(frozen=True)
class Tactic:
    """Block sizes of a kernel, by the names of its compile-time constants, and its launch.

    warps: of 32 threads, in a program. stages: iterations of a loop whose loads are in flight at once.
    """

    constants: Constants = field(hash=False)
    warps: int
    stages: int


class Node(NamedTuple):
    """One use of an operator.

    shapes: of the inputs, by name; a dimension may be a symbol. attributes: of the node. fixed: the same shapes as
    integers, with any negative number for a dimension that is known at run time only; the sizes that a kernel is
    compiled for must be known.
    """

    shapes: Shapes
    attributes: Mapping[str, int]
    fixed: Shapes

    @classmethod
    def of(cls, shapes: Shapes, attributes: Mapping[str, int] | None = None) -> Node:
        """A node whose shapes are integers."""
        return cls(shapes, attributes or {}, shapes)


class Operator(ABC):
    """kernel: its module in ``trimode.plugins.kernels`` and its function. attributes: integers that no shape gives."""

    name: str
    kernel: str
    inputs: tuple[Operand, ...]
    scalars: tuple[str, ...]
    outputs: tuple[Operand, ...]
    attributes: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """The kernel's run-time parameters, in order."""
        return (*(i.name for i in self.inputs), *self.scalars, *(o.name for o in self.outputs))

    @abstractmethod
    def constants(self, node: Node) -> Constants:
        """The kernel's compile-time constants, those of the tactic aside."""

    @abstractmethod
    def tactics(self, node: Node) -> dict[int, Tactic]:
        """The tactics that can compute the node, by their numbers from 1. With a dimension that is known at run time
        only, those that take any size.
        """

    def compiled_tactics(self, node: Node) -> dict[int, Tactic]:
        """The tactics for every size that is known at run time only."""
        return self.tactics(node)

    def default_tactic(self, _node: Node, emitted: Collection[int]) -> int:
        """The tactic for a launch that was not timed. The node's shapes are integers. emitted: the tactics that the GPU
        has kernels of.
        """
        return min(emitted)

    @abstractmethod
    def grid(self, node: Node, tactic: Tactic) -> tuple[Dim, Dim, Dim]: ...

    @abstractmethod
    def scalar_values(self, node: Node) -> tuple[Dim, ...]: ...

    @abstractmethod
    def output_shapes(self, node: Node) -> list[tuple[Dim, ...]]: ...

    def kernel_name(self, node: Node, tactic: int) -> str:
        """Name of the compiled kernel, for instance ``AttendMasked.KV_HEADS8.GROUP4.HEAD_DIM128.tactic1``."""
        constants = (f"{name}{value}" for name, value in self.constants(node).items())
        return ".".join((self.name, *constants, f"tactic{tactic}"))


def ceil_div(a: Dim, b: int) -> Dim:
    return (a + (b - 1)) // b


def row_count(shape: Sequence[Dim]) -> Dim:
    """The product of all dimensions but the last."""
    rows, *others = list(shape)[:-1]
    for dimension in others:
        rows = rows * dimension
    return rows


def numbered(tactics: Sequence[Tactic]) -> dict[int, Tactic]:
    return dict(enumerate(tactics, 1))
