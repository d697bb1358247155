"""The kernels of a compiled plan, from the log of TensorRT-RTX's builder: ``layers.json``.

Without a GPU, a plan cannot be deserialised and inspected. At log level VERBOSE with detailed profiling verbosity, the
builder logs one line for each kernel:

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
# Entries of the log that are not kernels: events between streams, and shapes that the host computes.
_NO_KERNEL = {"signal", "wait", "shape_call"}
# Sizes that the host computes and copies to the device. These lines have another format.
_SHAPE_COPY = "LayerType: ShapeHostToDevice,"


class KernelTensor(Record):
    """A tensor that a kernel reads or writes. A dimension of -1 is known at run time only. ``dtype``: by TensorRT's
    name.
    """

    name: str
    dims: tuple[int, ...]
    dtype: str


class PlanKernel(Record):
    """One kernel launch. ``kind``: the builder's LayerType. ``sources``: the nodes of the graph that it computes."""

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
    """The kernels in a builder's log messages, in order of launch. Raises RuntimeError if there is none, or if a line
    has another format, which means that TensorRT-RTX changed its log.
    """
    kernels = []
    for message in log:
        if "LayerType: " not in message:
            continue
        listed = sum(line.startswith("Name: ") and _SHAPE_COPY not in line for line in message.splitlines())
        found = list(_LINE.finditer(message))
        if len(found) != listed:
            raise RuntimeError(f"{listed - len(found)} of {listed} kernels in the builder's log have an unknown format")
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
