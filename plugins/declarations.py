"""The operators declared as TensorRT plugins: shapes, types, tactics, and a kernel for each tactic.

TensorRT times the tactics on the GPU that it builds for and embeds the kernel of the fastest one, so the plan needs
neither Python nor Triton. TensorRT reads a plugin's inputs and attributes from the parameters of the declaring
functions; here each function's signature is set from the operator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Union

import tensorrt as trt
import tensorrt.plugin as trtp

from trimode.engine.kernel_library import KernelLibrary
from trimode.model.step import ElementType
from trimode.plugins.operators import DOMAIN, PLUGINS, Node, Operand, Operator

# typing.Union, not `|`: TensorRT's validator compares their origins.
_AotResult = tuple[Union[str, bytes], Union[str, bytes], trtp.KernelLaunchParams, trtp.SymExprs]  # noqa: UP007
_TYPES: dict[ElementType, trt.DataType] = {
    "fp32": trt.DataType.FLOAT,
    "int64": trt.DataType.INT64,
    "int32": trt.DataType.INT32,
    "bool": trt.DataType.BOOL,
    "int8": trt.DataType.INT8,
}
_REALS = {"fp32": trt.DataType.FLOAT, "fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16}
_TYPE_NAMES = {trt.DataType.FLOAT: "FP32", trt.DataType.HALF: "FP16"}


class _Library:
    """TensorRT's plugin registry is global to the process and accepts each plugin once; the library can be replaced."""

    current: KernelLibrary | None = None


def declare_plugins(library: KernelLibrary) -> None:
    """Register every operator of the domain ``trimode``. Their kernels come from ``library`` from now on."""
    if _Library.current is None:
        for operator in PLUGINS.values():
            declare(operator)
    _Library.current = library


def declare(operator: Operator) -> None:
    plugin = f"{DOMAIN}::{operator.name}"
    inputs = {operand.name: trtp.TensorDesc for operand in operator.inputs}
    attributes = dict.fromkeys(operator.attributes, int)
    several: Any = tuple.__class_getitem__((trtp.TensorDesc,) * len(operator.outputs))

    def describe(*descs: Any, **values: int) -> Any:
        return _outputs(operator, descs, values)

    def autotune(*arguments: Any) -> Any:
        descs, values, outputs = arguments[: len(inputs)], arguments[len(inputs) : -1], arguments[-1]
        types = (_type_name(desc.dtype) for desc in (*descs, *outputs))
        node = _node(operator, descs, dict(zip(attributes, values, strict=True)))
        names = {tactic: operator.kernel_name(node, tactic) for tactic in operator.tactics(node)}
        tactics = _library(operator, descs).available(names)
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR", tactics)]

    def embed(*arguments: Any) -> Any:
        descs, values, tactic = arguments[: len(inputs)], arguments[len(inputs) : -2], arguments[-1]
        return _embed(operator, descs, dict(zip(attributes, values, strict=True)), tactic)

    trtp.register(plugin)(_signed(describe, {**inputs, **attributes}, several))
    trtp.autotune(plugin)(
        _signed(autotune, {**inputs, **attributes, "outputs": several}, list[trtp.AutoTuneCombination])
    )
    trtp.aot_impl(plugin)(_signed(embed, {**inputs, **attributes, "outputs": several, "tactic": int}, _AotResult))


def _signed(function: Callable[..., Any], parameters: dict[str, Any], result: Any) -> Callable[..., Any]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(named, return_annotation=result)  # type: ignore[attr-defined]
    return function


def _outputs(operator: Operator, descs: tuple[Any, ...], attributes: dict[str, int]) -> tuple[Any, ...]:
    shapes = operator.output_shapes(_node(operator, descs, attributes))
    by_name = {operand.name: desc for operand, desc in zip(operator.inputs, descs, strict=True)}
    real = _real(operator, descs)
    return tuple(
        by_name[operand.aliases].aliased() if operand.aliases else trtp.from_shape_expr(shape, _type(operand, real))
        for operand, shape in zip(operator.outputs, shapes, strict=True)
    )


def _embed(operator: Operator, descs: tuple[Any, ...], attributes: dict[str, int], tactic: int) -> tuple[Any, ...]:
    node = _node(operator, descs, attributes)
    library, name = _library(operator, descs), operator.kernel_name(node, tactic)
    kernel = library.find(name)
    grid = operator.grid(node, operator.tactics(node)[tactic])
    params = trtp.KernelLaunchParams(*grid, block_x=kernel.threads, shared_mem=kernel.shared_bytes)
    scalars = trtp.SymIntExprs.from_tuple([trtp.SymInt32(scalar) for scalar in operator.scalar_values(node)])
    return kernel.entry, library.ptx(name).decode(), params, scalars


def _library(operator: Operator, descs: tuple[Any, ...]) -> KernelLibrary:
    library, real = _Library.current, _real(operator, descs)
    if library is None or real != _REALS[library.index.real]:
        raise RuntimeError(f"{operator.name} has no kernels for {real}")
    return library


def _real(operator: Operator, descs: tuple[Any, ...]) -> trt.DataType:
    """The type of the activations: that of the inputs, or of the library's kernels if no input has it."""
    for operand, desc in zip(operator.inputs, descs, strict=True):
        if operand.type == "real":
            return desc.dtype
    return _REALS[_Library.current.index.real] if _Library.current else None


def _node(operator: Operator, descs: tuple[Any, ...], attributes: dict[str, int]) -> Node:
    """TensorRT gives symbols always, sizes only once it knows the profiles (-1 where they are dynamic)."""
    by_name = {operand.name: desc for operand, desc in zip(operator.inputs, descs, strict=True)}
    shapes = {name: list(desc.shape_expr) for name, desc in by_name.items()}
    fixed = {name: list(desc.shape) for name, desc in by_name.items() if desc.has_shape}
    return Node(shapes, attributes, fixed)


def _type(operand: Operand, real: trt.DataType) -> trt.DataType:
    return real if operand.type == "real" else _TYPES[operand.type]


def _type_name(dtype: trt.DataType) -> str:
    """As ``AutoTuneCombination`` spells it."""
    return str(_TYPE_NAMES.get(dtype, dtype.name))
