"""The weight pool of the graphs: one file of raw tensors, written in one pass over the checkpoint.

Both graphs refer to ranges of this file, so their constants are identical. Matrices are stored as [in, out], as
``MatMul`` reads them. Matrices that share an input are concatenated (q, k and v; gate and up).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from trimode.build.graph.int4_tiles import pack_tiles, pair_rows
from trimode.common.errors import TriModeError
from trimode.common.progress import Progress
from trimode.engine.manifest import PoolEntry
from trimode.model.checkpoint import HEAD, DenseWeight, Int4Weight
from trimode.model.config import ModelConfig
from trimode.model.int4 import unpack
from trimode.model.rope import query_scales, yarn_frequencies

# What reads the pool. ``onnx``: int4 matrices are ONNX's INT4, with scales of the type of the activations. ``kernels``:
# our GPU kernels. Int4 matrices are tiles with fp32 scales, and those of q, k and v and of gate and up have pairs of
# columns; norms and up include the input scales of what reads them, and attention multiplies its output by that of o,
# which is fp32; the embedding has the type of the activations; the pool holds the kernels' constants. ``dense``: int4
# matrices are products of integers, scales and input scales in the type of the activations.
Layout = Literal["onnx", "kernels", "dense"]
ALIGNMENT = 4096  # a page: every tensor can be mapped separately

ONNX_DTYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.int32): TensorProto.INT32,
}


# Matrices of a layer that read the same input are one matrix of the pool.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_O = ("self_attn.o_proj",)
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = ("mlp.down_proj",)
_EMBEDDING, _NORM = "encoder.embed_tokens", "encoder.norm"
# Vectors of fp32, in the order of KernelConstants.
CONSTANTS = ("rotary_frequencies", "key_scale", "query_scales", "rms_norm_epsilon")


def merged_matrices(config: ModelConfig) -> list[tuple[str, ...]]:
    """The checkpoint's modules, grouped by the matrix of the pool that holds them."""
    layers = range(config.num_hidden_layers)
    return [
        *(_of_layer(index, modules) for index in layers for modules in (_QKV, _O, _GATE_UP, _DOWN)),
        (HEAD,),
    ]


def _of_layer(index: int, modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"encoder.layers.{index}.{module}" for module in modules)


@dataclass(frozen=True)
class PoolRange:
    """One tensor of the pool; ``dtype`` is ONNX's, ``offset`` and ``length`` in bytes."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class PooledLinear:
    """y = (x * input_scale) W. With ``scale``, W is int4, in the layout that the pool was written with.

    input_scale: for kernels of our own, the operator that writes x multiplies it.
    paired: the columns are in the order of pairs (:mod:`trimode.build.graph.int4_tiles`).
    """

    weight: PoolRange
    scale: PoolRange | None = None
    input_scale: PoolRange | None = None
    group: int = 0
    paired: bool = False

    def matrix(self) -> Iterator[PoolRange]:
        """W."""
        yield from (part for part in (self.weight, self.scale) if part is not None)

    def ranges(self) -> Iterator[PoolRange]:
        yield from self.matrix()
        if self.input_scale is not None:
            yield self.input_scale


@dataclass(frozen=True)
class PooledLayer:
    input_layernorm: PoolRange
    qkv_proj: PooledLinear
    o_proj: PooledLinear
    post_attention_layernorm: PoolRange
    gate_up_proj: PooledLinear
    down_proj: PooledLinear


@dataclass(frozen=True)
class KernelConstants:
    """Small constants that kernels read, all fp32.

    frequencies: [head_dim / 2], of the rotation. key_scale: [1], YaRN's attention factor. query_scales: the scale of
    the queries by the position's multiple of the original context, with the attention factor and the softmax scale.
    epsilon: [1], of the norms.
    """

    frequencies: PoolRange
    key_scale: PoolRange
    query_scales: PoolRange
    epsilon: PoolRange

    @property
    def rotations(self) -> tuple[PoolRange, PoolRange, PoolRange]:
        """In the order of the operator ``Rotations``."""
        return self.frequencies, self.key_scale, self.query_scales


@dataclass(frozen=True)
class RawPool:
    """The ranges of all weights in the file. ``stored``: their bytes, without the padding to pages. constants: for
    targets with kernels of our own.
    """

    path: Path
    stored: int
    embed_tokens: PoolRange
    layers: tuple[PooledLayer, ...]
    norm: PoolRange
    head: PooledLinear
    constants: KernelConstants | None = None

    def linears(self) -> Iterator[PooledLinear]:
        for layer in self.layers:
            yield from (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
        yield self.head

    def entries(self) -> tuple[PoolEntry, ...]:
        """The ranges, as the manifest lists them."""
        return tuple(PoolEntry(name=entry.name, offset=entry.offset, bytes=entry.length) for entry in self.ranges())

    def ranges(self) -> Iterator[PoolRange]:
        """Every tensor, in the order of the file."""
        yield self.embed_tokens
        for layer in self.layers:
            yield layer.input_layernorm
            yield from layer.qkv_proj.ranges()
            yield from layer.o_proj.ranges()
            yield layer.post_attention_layernorm
            yield from layer.gate_up_proj.ranges()
            yield from layer.down_proj.ranges()
        yield self.norm
        yield from self.head.ranges()
        if self.constants is not None:
            yield from self.constants.rotations
            yield self.constants.epsilon


class WeightSource(Protocol):
    """A checkpoint, or the part of it that one rank holds."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    def linear(self, module: str) -> DenseWeight | Int4Weight: ...

    def input_scale(self, module: str) -> NDArray[np.float32] | None: ...

    def vector(self, name: str) -> NDArray[Any]: ...


def write_raw_pool(
    checkpoint: WeightSource,
    path: Path,
    progress: Progress,
    real: np.dtype[np.generic],
    layout: Layout = "onnx",
) -> RawPool:
    """Write the checkpoint's weights to ``path``. At most one matrix of one layer is in memory at a time.

    real: type of norms, input scales and matrices that are not int4.
    """
    for_kernels = layout == "kernels"
    layers = checkpoint.config.num_hidden_layers
    with path.open("wb") as file:
        writer = _Writer(file, checkpoint, real, layout)
        embed_tokens = writer.embedding(real if for_kernels else None)
        halves = (checkpoint.config.head_dim // 2, checkpoint.config.intermediate_size) if for_kernels else (0, 0)
        pooled = []
        for index in range(layers):
            progress("weights", index, layers + 1)
            prefix = f"encoder.layers.{index}"
            pooled.append(
                PooledLayer(
                    input_layernorm=writer.norm(f"{prefix}.input_layernorm", _of_layer(index, _QKV)),
                    qkv_proj=writer.linear(*_of_layer(index, _QKV), half=halves[0], folded=True),
                    o_proj=writer.linear(*_of_layer(index, _O)),
                    post_attention_layernorm=writer.norm(
                        f"{prefix}.post_attention_layernorm", _of_layer(index, _GATE_UP)
                    ),
                    gate_up_proj=writer.linear(
                        *_of_layer(index, _GATE_UP), half=halves[1], folded=True, reader=_of_layer(index, _DOWN)[0]
                    ),
                    down_proj=writer.linear(*_of_layer(index, _DOWN), folded=True),
                )
            )
        progress("weights", layers, layers + 1)
        norm = writer.norm(_NORM, (HEAD,))
        head = writer.linear(HEAD, folded=True)
        constants = writer.kernel_constants() if for_kernels else None
        progress("weights", layers + 1, layers + 1)
    return RawPool(path, writer.stored, embed_tokens, tuple(pooled), norm, head, constants)


def find_raw_pool(path: Path, config: ModelConfig, ranges: Mapping[str, PoolRange], group: int | None) -> RawPool:
    """The pool for kernels in the file ``path``, which :func:`write_raw_pool` wrote. ranges: all of it, by name. group:
    of the int4 matrices.
    """

    def linear(*modules: str) -> PooledLinear:
        name = modules[0] if len(modules) == 1 else merged_name(modules)
        scale = ranges.get(f"{name}.scale")
        if scale is None:
            return PooledLinear(ranges[name])
        return PooledLinear(ranges[name], scale, ranges.get(f"{name}.input_scale"), group or 0, len(modules) > 1)

    layers = tuple(
        PooledLayer(
            input_layernorm=ranges[f"encoder.layers.{index}.input_layernorm"],
            qkv_proj=linear(*_of_layer(index, _QKV)),
            o_proj=linear(*_of_layer(index, _O)),
            post_attention_layernorm=ranges[f"encoder.layers.{index}.post_attention_layernorm"],
            gate_up_proj=linear(*_of_layer(index, _GATE_UP)),
            down_proj=linear(*_of_layer(index, _DOWN)),
        )
        for index in range(config.num_hidden_layers)
    )
    constants = KernelConstants(*(ranges[name] for name in CONSTANTS))
    stored = sum(entry.length for entry in ranges.values())
    return RawPool(path, stored, ranges[_EMBEDDING], layers, ranges[_NORM], linear(HEAD), constants)


class _Writer:
    def __init__(
        self,
        file: BinaryIO,
        checkpoint: WeightSource,
        real: np.dtype[np.generic],
        layout: Layout,
    ) -> None:
        self._file = file
        self._checkpoint = checkpoint
        self._real = real
        self._layout = layout
        self._for_kernels = layout == "kernels"
        self.stored = 0

    def embedding(self, dtype: np.dtype[np.generic] | None) -> PoolRange:
        """dtype: None for the checkpoint's type, since a lookup needs no wider one."""
        table = self._checkpoint.vector("encoder.embed_tokens.weight")
        return self._put(_EMBEDDING, table if dtype is None else table.astype(dtype, copy=False))

    def kernel_constants(self) -> KernelConstants:
        config = self._checkpoint.config
        frequencies, factor = yarn_frequencies(config)
        return KernelConstants(
            *(
                self._put(name, np.asarray(values).astype(np.float32))
                for name, values in zip(
                    CONSTANTS,
                    (frequencies, [factor], query_scales(config) * factor, [config.rms_norm_eps]),
                    strict=True,
                )
            )
        )

    def norm(self, module: str, readers: tuple[str, ...]) -> PoolRange:
        """The norm's weight. For kernels of our own, it includes the input scale of the matrices that read the norm,
        which share it.
        """
        weight = self._checkpoint.vector(f"{module}.weight")
        input_scale = self._checkpoint.input_scale(readers[0]) if self._for_kernels else None
        if input_scale is not None:
            weight = weight.astype(np.float32) * input_scale
        return self._put(module, weight.astype(self._real))

    def linear(self, *modules: str, half: int = 0, folded: bool = False, reader: str | None = None) -> PooledLinear:
        """One matrix, or several that read the same input, concatenated along ``out``.

        half: columns of an int4 matrix from the first of a pair to the second; 0 to keep the order of the columns.
        folded: for kernels of our own, the norm or the matrix before it includes its input scale. reader: the matrix
        that reads a product with the last one's output, and whose input scale the last one then includes.
        """
        weights = [self._checkpoint.linear(module) for module in modules]
        name = modules[0] if len(modules) == 1 else merged_name(modules)
        int4 = [weight for weight in weights if isinstance(weight, Int4Weight)]
        factors = self._output_scale(reader)
        if self._layout == "dense" or not int4:
            matrices = [weight.to_float32() if isinstance(weight, Int4Weight) else weight.array for weight in weights]
            if factors is not None:
                matrices[-1] = matrices[-1].astype(np.float32) * factors
            dense = [matrix.astype(self._real, copy=False) for matrix in matrices]
            return PooledLinear(self._put(name, np.concatenate(dense).T))
        if len(int4) < len(weights) or not _share_input_scale(int4):
            raise TriModeError(
                f"{self._checkpoint.folder}: {', '.join(modules)} read one input but are quantised differently; "
                "quantise the checkpoint with `trimode quantize`"
            )
        packed = np.concatenate([weight.packed for weight in int4])
        scale = np.concatenate([weight.scale for weight in int4])
        group = packed.shape[1] // scale.shape[1]
        if factors is not None:
            scale[-len(int4[-1].scale) :] *= factors
        if self._for_kernels:
            integers = unpack(packed)
            if half:
                integers, scale = pair_rows(integers, half), pair_rows(scale, half)
            stored = self._put(name, pack_tiles(integers, group))
        else:
            # ModelOpt packs pairs along `out`. Transposed, that is ONNX's packing along the last dimension.
            stored = self._put(name, packed.T, TensorProto.INT4, (packed.shape[1], packed.shape[0] * 2))
        factor_type = np.dtype(np.float32) if self._for_kernels else self._real
        input_scale = None if folded and self._for_kernels else int4[0].input_scale
        return PooledLinear(
            weight=stored,
            scale=self._put(f"{name}.scale", scale.T.astype(factor_type)),
            input_scale=(
                None if input_scale is None else self._put(f"{name}.input_scale", input_scale.astype(factor_type))
            ),
            group=group,
            paired=half > 0,
        )

    def _output_scale(self, reader: str | None) -> NDArray[np.float32] | None:
        """For kernels of our own, the input scale of ``reader``, [in, 1]; None if it has none."""
        scale = self._checkpoint.input_scale(reader) if self._for_kernels and reader is not None else None
        return None if scale is None else scale[:, None]

    def _put(
        self, name: str, array: NDArray[np.generic], dtype: int | None = None, shape: tuple[int, ...] | None = None
    ) -> PoolRange:
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.seek(offset)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self.stored += array.nbytes
        return PoolRange(
            name, ONNX_DTYPES[array.dtype] if dtype is None else dtype, shape or array.shape, offset, array.nbytes
        )


def merged_name(modules: tuple[str, ...]) -> str:
    """E.g. ``encoder.layers.0.self_attn.q_k_v``."""
    parent = modules[0].rpartition(".")[0]
    return f"{parent}." + "_".join(module.rpartition(".")[2].removesuffix("_proj") for module in modules)


def _share_input_scale(weights: list[Int4Weight]) -> bool:
    first = weights[0].input_scale
    if first is None:
        return all(weight.input_scale is None for weight in weights)
    return all(weight.input_scale is not None and np.array_equal(weight.input_scale, first) for weight in weights)
