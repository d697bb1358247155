"""Weight pool of target ``cpu``: the constants that ONNX Runtime wrote for both engines' graphs, merged into one file.

Offline optimisation writes a graph's constants, each followed by the kernel's packed copy, to a file in arbitrary
order. The constants of both engines have the same names and bytes. This is checked while they are copied into one file,
ordered by name. Then all graphs refer to this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from trimode.engine.manifest import PoolEntry

ALIGNMENT = 4096  # a page: every constant can be mapped separately
_CHUNK = 1 << 22
_PREPACKED = "prepacked_"


@dataclass(frozen=True)
class _Blob:
    """A packed copy: the kernel's key, the location in the file, and ONNX Runtime's checksum field."""

    key: str
    offset: int
    length: int
    checksum: str


@dataclass(frozen=True)
class _Constant:
    """The range of a constant in a file, and its packed copies."""

    offset: int
    length: int
    blobs: tuple[_Blob, ...]

    def ranges(self) -> Iterator[tuple[int, int]]:
        yield self.offset, self.length
        for blob in self.blobs:
            yield blob.offset, blob.length


def data_file(model: Path) -> Path:
    """The file of an optimised model's constants, before they are merged."""
    return model.with_suffix(".bin")


def merge_pools(engines: list[list[Path]], pool: Path) -> tuple[PoolEntry, ...]:
    """Write one pool for the optimised models of both engines, make them refer to it, and remove their data files.

    Returns the ranges of the pool. Raises RuntimeError that names a constant that differs between two models, or that
    only one engine has.
    """
    graphs = {model: onnx.load(model, load_external_data=False) for engine in engines for model in engine}
    constants = {model: _constants(graph) for model, graph in graphs.items()}
    names = [set[str]().union(*(constants[model] for model in engine)) for engine in engines]
    for others in names[1:]:
        if differing := names[0] ^ others:
            raise RuntimeError(f"only one of the engines has the constant {min(differing)}")
    placed: dict[str, _Constant] = {}
    with pool.open("wb") as target:
        for name in sorted(names[0]):
            copies = {data_file(model): found[name] for model, found in constants.items() if name in found}
            first = next(iter(copies.values()))
            starts = []
            for ranges in zip(*(copy.ranges() for copy in copies.values()), strict=True):
                target.seek(-(-target.tell() // ALIGNMENT) * ALIGNMENT)
                starts.append(target.tell())
                for chunks in _read_together(list(copies), list(ranges)):
                    if any(chunk != chunks[0] for chunk in chunks):
                        raise RuntimeError(f"the engines' constant {name} differs")
                    target.write(chunks[0])
            blobs = [
                _Blob(blob.key, start, blob.length, blob.checksum)
                for blob, start in zip(first.blobs, starts[1:], strict=True)
            ]
            placed[name] = _Constant(starts[0], first.length, tuple(blobs))
    for model, graph in graphs.items():
        _set_location(graph, pool.name, placed)
        onnx.save(graph, model)
        data_file(model).unlink(missing_ok=True)  # a piece may have no constants
    return tuple(
        PoolEntry(
            name=name,
            offset=constant.offset,
            bytes=constant.length,
            packed_offset=constant.blobs[0].offset if constant.blobs else None,
            packed_bytes=sum(blob.length for blob in constant.blobs),
        )
        for name, constant in placed.items()
    )


def _constants(model: onnx.ModelProto) -> dict[str, _Constant]:
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        fields = {field.key: field.value for field in tensor.external_data}
        blobs = [_blob(value) for key, value in sorted(fields.items()) if key.startswith(_PREPACKED)]
        found[tensor.name] = _Constant(int(fields["offset"]), int(fields["length"]), tuple(blobs))
    return found


def _blob(value: str) -> _Blob:
    """Parse ONNX Runtime's ``key|offset;length;checksum``. Kernels with several blobs, which would repeat the second
    part, are not supported.
    """
    key, *places = value.split("|")
    if len(places) != 1:
        raise RuntimeError(f"unexpected format of a packed constant: {value}")
    offset, length, checksum = places[0].split(";")
    return _Blob(key, int(offset), int(length), checksum)


def _set_location(model: onnx.ModelProto, location: str, placed: dict[str, _Constant]) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        constant = placed[tensor.name]
        del tensor.external_data[:]
        fields = {"location": location, "offset": str(constant.offset), "length": str(constant.length)}
        for index, blob in enumerate(constant.blobs):
            fields[f"{_PREPACKED}{index}"] = f"{blob.key}|{blob.offset};{blob.length};{blob.checksum}"
        for key, value in fields.items():
            tensor.external_data.add(key=key, value=value)


def _read_together(files: list[Path], ranges: list[tuple[int, int]]) -> Iterator[list[bytes]]:
    """Read one range of every file in chunks. If the ranges have different lengths, their last chunks differ."""
    handles = [file.open("rb") for file in files]
    try:
        left = []
        for handle, (offset, length) in zip(handles, ranges, strict=True):
            handle.seek(offset)
            left.append(length)
        while any(left):
            chunks = [handle.read(min(_CHUNK, length)) for handle, length in zip(handles, left, strict=True)]
            if not all(chunks):
                raise RuntimeError(f"{files[0].name} is shorter than its constants")
            left = [length - len(chunk) for length, chunk in zip(left, chunks, strict=True)]
            yield chunks
    finally:
        for handle in handles:
            handle.close()
