"""The kernels of a compiled plan, as TensorRT-RTX's builder lists them: ``layers.json``.

A plan cannot be opened without a GPU, so its own inspector is out of reach; but at the level VERBOSE, with detailed
profiling verbosity, the builder logs every kernel in one line each:

``Name: ..., LayerType: ..., Inputs: [ { Name: ..., Dimensions: [-1,4096], ..., Datatype: Half, ... }, ...],
Constants: [...], Outputs: [...], TacticName: ..., StreamId: 0, Metadata: [ONNX Layer: MatMul_7]...``
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import RootModel

from trimode.engine.record import Record

_LINE = re.compile(
    r"^Name: (?P<name>\S+), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?, StreamId: (?P<stream>\d+),(?: EventId: \d+,)? "
    r"Metadata: (?P<metadata>.*)$",
    re.MULTILINE,
)
_TENSOR = re.compile(r"\{ Name: (\S+), Dimensions: \[([-\d,]*)\], .*?Datatype: (\w+)")
_SOURCE = re.compile(r"ONNX Layer: ([^\]]+)")
# What the list has besides kernels: events between streams, and shapes computed on the host.
_NO_KERNEL = {"signal", "wait", "shape_call"}
# Sizes that the host computes and sends along; the line has a form of its own.
_SHAPE_COPY = "LayerType: ShapeHostToDevice,"


class KernelTensor(Record):
    """A tensor that a kernel reads or writes; a dimension of -1 is known at run time. ``dtype`` is TensorRT's name."""

    name: str
    dims: tuple[int, ...]
    dtype: str


class PlanKernel(Record):
    """One launch. ``kind``: the builder's class of it. ``sources``: the graph's nodes that it computes."""

    name: str
    kind: str
    stream: int
    inputs: tuple[KernelTensor, ...]
    constants: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    sources: tuple[str, ...]


class KernelList(RootModel[tuple[PlanKernel, ...]]):
    """``layers.json``."""


def parse_kernels(log: Iterable[str]) -> KernelList:
    """The kernels in a builder's log messages, in order of launch. Raises RuntimeError if it lists none, or a line has
    another form: TensorRT-RTX changed its log then.
    """
    kernels = []
    for message in log:
        if "LayerType: " not in message:
            continue
        listed = sum(line.startswith("Name: ") and _SHAPE_COPY not in line for line in message.splitlines())
        found = list(_LINE.finditer(message))
        if len(found) != listed:
            raise RuntimeError(f"{listed - len(found)} of {listed} kernels in the builder's log have an unknown form")
        kernels += [
            PlanKernel(
                name=line["name"],
                kind=line["kind"],
                stream=int(line["stream"]),
                inputs=_tensors(line["inputs"]),
                constants=_tensors(line["constants"]),
                outputs=_tensors(line["outputs"]),
                sources=tuple(_SOURCE.findall(line["metadata"])),
            )
            for line in found
            if line["kind"] not in _NO_KERNEL
        ]
    if not kernels:
        raise RuntimeError("the builder's log lists no kernels")
    return KernelList(tuple(kernels))


def _tensors(text: str) -> tuple[KernelTensor, ...]:
    return tuple(
        KernelTensor(name=name, dims=tuple(int(size) for size in dims.split(",") if size), dtype=dtype)
        for name, dims, dtype in _TENSOR.findall(text)
    )
