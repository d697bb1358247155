"""Weight pool of target ``cpu``: the constants that ONNX Runtime wrote for two graphs, merged into one file.

Offline optimisation writes a graph's constants, each followed by the kernel's packed copy, to a file in arbitrary
order. The constants of both graphs have the same names and bytes. This is checked while they are copied into one file,
ordered by name. Then both graphs refer to this file.
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


def merge_pools(models: list[Path], pool: Path) -> tuple[PoolEntry, ...]:
    """Write one pool for the optimised ``models``, make them refer to it, and remove their own data files.

    The data file of each model is in the model's folder and has the name of ``pool``. Returns the ranges of the pool.
    Raises RuntimeError that names the constant in which two models differ.
    """
    graphs = [onnx.load(model, load_external_data=False) for model in models]
    constants = [_constants(graph) for graph in graphs]
    for other in constants[1:]:
        if differing := constants[0].keys() ^ other.keys():
            raise RuntimeError(f"only one of the engines has the constant {min(differing)}")
    placed: dict[str, _Constant] = {}
    sources = [model.with_name(pool.name) for model in models]
    with pool.open("wb") as target:
        for name in sorted(constants[0]):
            blobs = []
            starts = []
            for ranges in zip(*(table[name].ranges() for table in constants), strict=True):
                target.seek(-(-target.tell() // ALIGNMENT) * ALIGNMENT)
                starts.append(target.tell())
                for chunks in _read_together(sources, list(ranges)):
                    if any(chunk != chunks[0] for chunk in chunks):
                        raise RuntimeError(f"the engines' constant {name} differs")
                    target.write(chunks[0])
            first = constants[0][name]
            for blob, start in zip(first.blobs, starts[1:], strict=True):
                blobs.append(_Blob(blob.key, start, blob.length, blob.checksum))
            placed[name] = _Constant(starts[0], first.length, tuple(blobs))
    for graph, model, source in zip(graphs, models, sources, strict=True):
        _set_location(graph, pool.name, placed)
        onnx.save(graph, model)
        source.unlink()
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
