"""Call a declared plugin like TensorRT's builder, through the classes that TensorRT's bindings create for it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from trimode.build.gpu.kernel_emission import NeededKernel, kernels_of, write_kernels
from trimode.common.progress import no_progress
from trimode.plugins.operators import OPERATORS, PLUGINS, Head, Node

STEP, BATCH, CAPACITY, SPLITS = 70, 3, 256, 5
HEADS, KV_HEADS, SIZE = 4, 2, 32
INNER, COLUMNS, GROUP, RANK = 256, 192, 32, 16
VOCABULARY, TILES, TOP_K, MASK_TOKEN = 5000, 79, 4, 9
ROWS, ASKED, SCALES, LENGTH = 6, 5, 3, 64
WIDTH = (HEADS + 2 * KV_HEADS) * SIZE
CACHE = (BATCH, KV_HEADS, CAPACITY, SIZE)
ROTATION = (BATCH, STEP, SIZE // 2)
# An input of a plugin: type, shape in a pass, and the dimensions that are known at run time only.
Input = tuple[str, tuple[int, ...], tuple[int, ...]]
# The inputs of a small network.
INPUTS: dict[str, Input] = {
    "qkv": ("HALF", (BATCH, STEP, WIDTH), (0, 1)),
    **dict.fromkeys(("query_cos", "query_sin", "key_cos", "key_sin"), ("HALF", ROTATION, (0, 1))),
    "write_indices": ("INT64", (BATCH,), (0,)),
    **dict.fromkeys(("k_cache", "v_cache"), ("HALF", CACHE, (0,))),
    "q": ("HALF", (BATCH, HEADS, STEP, SIZE), (0, 2)),
    "step_lengths": ("INT64", (BATCH,), (0,)),
    "block_mask": ("BOOL", (BATCH, STEP, STEP), (0, 1, 2)),
    "partial": ("HALF", (BATCH, 3, HEADS, STEP, SIZE), (0, 1, 3)),
    "log_sum_exp": ("FLOAT", (BATCH, 3, HEADS, STEP), (0, 1, 3)),
    "x": ("HALF", (BATCH, STEP, INNER), (0, 1)),
    "packed": ("INT32", (2, INNER // GROUP, 128, GROUP // 8), ()),
    "counters": ("INT32", (12,), ()),
    "scale": ("FLOAT", (INNER // GROUP, COLUMNS), ()),
    "output_scale": ("FLOAT", (HEADS * SIZE,), ()),
    "squares": ("FLOAT", (INNER // 64, BATCH * STEP), (1,)),
    "next_weight": ("HALF", (COLUMNS,), ()),
    "narrow": ("HALF", (BATCH, STEP, RANK), (0, 1)),
    "adapter_up": ("HALF", (RANK, COLUMNS), ()),
    "residual": ("HALF", (BATCH, STEP, COLUMNS), (0, 1)),
    "input_ids": ("INT64", (BATCH, STEP), (0, 1)),
    "table": ("HALF", (VOCABULARY, INNER), ()),
    "position_ids": ("INT64", (BATCH, STEP), (0, 1)),
    "frequencies": ("FLOAT", (SIZE // 2,), ()),
    "key_scale": ("FLOAT", (1,), ()),
    "query_scales": ("FLOAT", (SCALES,), ()),
    "epsilon": ("FLOAT", (1,), ()),
    "gate_up": ("HALF", (BATCH, STEP, 2 * COLUMNS), (0, 1)),
    "weight": ("HALF", (INNER, COLUMNS), ()),
    "row_scale": ("HALF", (BATCH,), (0,)),
    "logit_rows": ("INT64", (BATCH, ROWS), (0, 1)),
    "logits": ("FLOAT", (BATCH, ROWS, VOCABULARY), (0, 1)),
    "token_mask": ("INT32", (BATCH, ROWS, 157), (0, 1)),
    "tile_logits": ("FLOAT", (BATCH, ROWS, TILES), (0, 1)),
    "tile_tokens": ("INT32", (BATCH, ROWS, TILES), (0, 1)),
    "tile_sums": ("FLOAT", (BATCH, ROWS, TILES), (0, 1)),
    "asked_ids": ("INT64", (BATCH, ROWS, ASKED), (0, 1, 2)),
}
# Operands that have the name of another operator's operand, but not its shape.
OTHER_INPUTS: dict[str, dict[str, Input]] = {
    "RmsNorm": {"weight": ("HALF", (INNER,), ())},
    "EmbedForNorm": {"next_weight": ("HALF", (INNER,), ())},
    **{
        name: {
            "x": ("HALF", (BATCH, ROWS, INNER), (0, 1)),
            "packed": ("INT32", (40, INNER // GROUP, 128, GROUP // 8), ()),
            "scale": ("FLOAT", (INNER // GROUP, VOCABULARY), ()),
            "squares": ("FLOAT", (INNER // 64, BATCH * ROWS), (1,)),
            "weight": ("HALF", (INNER, VOCABULARY), ()),
        }
        for name, operator in OPERATORS.items()
        if isinstance(operator, Head)
    },
    **{
        name: {"scale": ("FLOAT", (INNER // GROUP, WIDTH), ()), "counters": ("INT32", (16,), ())}
        for name in OPERATORS
        if name.startswith("QkvProduct")
    },
}


# Operators of which all tactics are compiled. The others have the same kernels with other terms.
COMPILED = (
    *("KvWrite", "AttendMasked", "AttendBidirectional", "MergeSplits"),
    *("Int4Product", "Int4ProductSplitAdaptedResidual", "Int4ProductSplitNormedGated", "QkvProductSplitNormed"),
    *("EmbedForNorm", "Rotations", "RmsNorm", "SwiGlu", "SelectRows"),
    *("DenseProductRowScaled", "DenseProductAdaptedResidual", "DenseHeadMasked", "MergeCandidates"),
)


@dataclass
class Number:
    """In place of TensorRT's symbolic dimension. constant: known when the engine is built."""

    value: int
    constant: bool

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return self.value


@dataclass
class PassedSymbol:
    """In place of the object that passes a symbol to TensorRT."""

    symbol: Any

    @property
    def expr(self) -> Number:
        found = self.symbol._expr
        assert isinstance(found, Number)
        return found


class DimsExprs(list[Any]):
    """Like TensorRT's: created with a length, then filled."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Arithmetic:
    """In place of TensorRT's expression builder: computes with numbers."""

    OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
        "SUM": operator.add,
        "SUB": operator.sub,
        "PROD": operator.mul,
        "FLOOR_DIV": operator.floordiv,
        "CEIL_DIV": lambda a, b: -(-a // b),
        "MAX": max,
        "MIN": min,
    }

    def constant(self, value: int) -> Number:
        return Number(value, constant=True)

    def operation(self, kind: Any, first: Number, second: Number) -> Number:
        value = self.OPERATIONS[kind.name](first.value, second.value)
        return Number(value, first.constant and second.constant)


@dataclass
class Registry:
    """Keeps the creators that declarations register, by namespace and name."""

    creators: dict[tuple[str, str], Any] = field(default_factory=dict)

    def itself(self) -> Registry:
        return self

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[namespace, creator.name] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        assert version == "1"
        return self.creators[namespace, name]


@dataclass(frozen=True)
class EmbeddedKernel:
    """What a plan would embed for one tactic, with its symbols evaluated."""

    entry: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    scalars: tuple[int, ...]


@dataclass(frozen=True)
class Built:
    """aliases: the input in whose memory each output lies, -1 for none."""

    output_types: tuple[str, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    aliases: tuple[int, ...]
    kernels: dict[int, EmbeddedKernel]


def attributes_of(name: str) -> dict[str, int]:
    values = {
        "splits": SPLITS,
        "group": HEADS // KV_HEADS,
        "length": LENGTH,
        "top_k": TOP_K,
        "mask_token": MASK_TOKEN,
    }
    return {attribute: values[attribute] for attribute in OPERATORS[name].attributes}


def build(
    trt: Any, name: str, inputs: Mapping[str, Input] | None = None, attributes: Mapping[str, int] | None = None
) -> Built:
    """Query types, shapes, formats and tactics, then a kernel for each tactic, in the order of TensorRT's builder."""
    fields = [
        trt.PluginField(key, np.array([value], np.int64), trt.PluginFieldType.INT64)
        for key, value in (attributes_of(name) if attributes is None else attributes).items()
    ]
    creator = trt.get_plugin_registry().get_creator(name, "1", "trimode")
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    phase = trt.TensorRTPhase.BUILD
    plugin = creator.create_plugin(name, "trimode", trt.PluginFieldCollection(fields), phase, request)
    inputs = {**INPUTS, **OTHER_INPUTS.get(name, {})} if inputs is None else inputs
    given = [inputs[operand.name] for operand in OPERATORS[name].inputs]
    ranks = [len(shape) for _, shape, _ in given]
    types = plugin.get_output_data_types([getattr(trt.DataType, dtype) for dtype, _, _ in given], ranks)
    exprs = [[Number(size, at not in dynamic) for at, size in enumerate(shape)] for _, shape, dynamic in given]
    outputs = plugin.get_output_shapes(exprs, [], Arithmetic())
    described = [
        _described(trt, getattr(trt.DataType, dtype), expr) for (dtype, _, _), expr in zip(given, exprs, strict=True)
    ]
    described += [_described(trt, dtype, expr) for dtype, expr in zip(types, outputs, strict=True)]
    combinations = plugin.get_supported_format_combinations(described, len(given))
    assert [combination.type for combination in combinations] == [desc.desc.type for desc in described]
    plugin.configure_plugin(described[: len(given)], described[len(given) :])
    kernels = {}
    for tactic in sorted(plugin.get_valid_tactics()):
        plugin.set_tactic(tactic)
        launch, scalars = SimpleNamespace(), _Scalars()
        plugin.get_launch_params(exprs, described, len(given), launch, scalars, Arithmetic())
        descs = [desc.desc for desc in described]
        entry, ptx = plugin.get_kernel(descs[: len(given)], descs[len(given) :])
        kernels[tactic] = EmbeddedKernel(
            entry,
            ptx.decode(),
            tuple(getattr(launch, f"grid_{axis}").expr.value for axis in "xyz"),
            tuple(getattr(launch, f"block_{axis}").expr.value for axis in "xyz"),
            launch.shared_mem.expr.value,
            tuple(scalars.values[index] for index in range(scalars.nbSymExprs)),
        )
    return Built(
        tuple(dtype.name for dtype in types),
        tuple(tuple(size.value for size in shape) for shape in outputs),
        tuple(plugin.get_aliased_input(index) for index in range(len(types))),
        kernels,
    )


class _Scalars:
    """In place of TensorRT's list of a kernel's scalars."""

    def __init__(self) -> None:
        self.nbSymExprs = 0
        self.values: dict[int, int] = {}

    def __setitem__(self, index: int, expr: Any) -> None:
        self.values[index] = expr.expr.value


def _described(trt: Any, dtype: Any, expr: list[Number]) -> Any:
    inner = trt.PluginTensorDesc()
    inner.dims = trt.Dims([size.value if size.constant else -1 for size in expr])
    inner.type = dtype
    inner.format = trt.TensorFormat.LINEAR
    desc = trt.DynamicPluginTensorDesc()
    desc.desc = inner
    return desc


def write_small_library(folder: Path) -> Path:
    """Kernels of the network of :data:`INPUTS` for compute capability 9.0, in fp16: all tactics of :data:`COMPILED`,
    and the first one of every other operator.
    """
    needed: dict[str, NeededKernel] = {}
    for name, declared in PLUGINS.items():
        fixed = {
            operand.name: tuple(-1 if at in dynamic else size for at, size in enumerate(shape))
            for operand in declared.inputs
            for _, shape, dynamic in [{**INPUTS, **OTHER_INPUTS.get(name, {})}[operand.name]]
        }
        kernels = list(kernels_of(declared, Node.of(fixed, attributes_of(name))).items())
        needed |= dict(kernels if name in COMPILED else kernels[:1])
    write_kernels(needed, "fp16", (90,), folder, no_progress)
    return folder
