"""The operators as TensorRT plugins: shapes, types, tactics, and for each tactic a kernel that the engine embeds.

The engine then needs neither Python nor Triton. TensorRT times the tactics, which differ in block sizes, on the GPU
that it builds for. A plugin is declared by functions whose parameters are its inputs and attributes by name; ours come
from :mod:`trimode.plugins.contracts`, so each function's signature is set and not written out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Union

import tensorrt as trt
import tensorrt.plugin as trtp

from trimode.plugins.contracts import DOMAIN, ElementType, Operand
from trimode.plugins.kernel_library import KernelLibrary
from trimode.plugins.launches import LAUNCHES, Call, Launch

# typing's Tuple and Union: TensorRT's validator asks for their origins.
_AotResult = tuple[Union[str, bytes], Union[str, bytes], trtp.KernelLaunchParams, trtp.SymExprs]  # noqa: UP007
_TYPES: dict[ElementType, trt.DataType] = {
    "fp32": trt.DataType.FLOAT,
    "int64": trt.DataType.INT64,
    "bool": trt.DataType.BOOL,
    "int8": trt.DataType.INT8,
}
_REALS = {"fp32": trt.DataType.FLOAT, "fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16}
_TYPE_NAMES = {trt.DataType.FLOAT: "FP32", trt.DataType.HALF: "FP16"}


class _Library:
    """TensorRT's registry is the process's and takes each plugin once; the kernels behind them can be exchanged."""

    current: KernelLibrary | None = None


def declare_plugins(library: KernelLibrary) -> None:
    """Register every operator of the domain ``trimode``; from now on their kernels come from ``library``."""
    if _Library.current is None:
        for launch in LAUNCHES.values():
            declare(launch)
    _Library.current = library


def declare(launch: Launch) -> None:
    operator = launch.operator
    plugin = f"{DOMAIN}::{operator.name}"
    inputs = {operand.name: trtp.TensorDesc for operand in operator.inputs}
    attributes = dict.fromkeys(operator.attributes, int)
    several: Any = tuple.__class_getitem__((trtp.TensorDesc,) * len(operator.outputs))

    def describe(*descs: Any, **values: int) -> Any:
        return _outputs(launch, descs, values)

    def autotune(*arguments: Any) -> Any:
        descs, values, outputs = arguments[: len(inputs)], arguments[len(inputs) : -1], arguments[-1]
        names = (_type_name(desc.dtype) for desc in (*descs, *outputs))
        call = _call(launch, descs, dict(zip(attributes, values, strict=True)))
        tactics = _library(launch, descs).tactics(launch.operator, launch.constants(call), launch.tactics(call))
        return [trtp.AutoTuneCombination(", ".join(names), "LINEAR", tactics)]

    def embed(*arguments: Any) -> Any:
        descs, values, tactic = arguments[: len(inputs)], arguments[len(inputs) : -2], arguments[-1]
        return _embed(launch, descs, dict(zip(attributes, values, strict=True)), tactic)

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


def _outputs(launch: Launch, descs: tuple[Any, ...], attributes: dict[str, int]) -> tuple[Any, ...]:
    shapes = launch.outputs(_call(launch, descs, attributes))
    by_name = {operand.name: desc for operand, desc in zip(launch.operator.inputs, descs, strict=True)}
    return tuple(
        by_name[operand.aliases].aliased()
        if operand.aliases
        else trtp.from_shape_expr(shape, _type(operand, descs[0].dtype))
        for operand, shape in zip(launch.operator.outputs, shapes, strict=True)
    )


def _embed(launch: Launch, descs: tuple[Any, ...], attributes: dict[str, int], tactic: int) -> tuple[Any, ...]:
    call = _call(launch, descs, attributes)
    kernel, ptx = _library(launch, descs).find(launch.operator, launch.constants(call), tactic)
    grid = launch.grid(call, launch.tactics(call)[tactic])
    params = trtp.KernelLaunchParams(*grid, block_x=kernel.threads, shared_mem=kernel.shared_bytes)
    scalars = trtp.SymIntExprs.from_tuple([trtp.SymInt32(scalar) for scalar in launch.scalars(call)])
    return kernel.entry, ptx, params, scalars


def _library(launch: Launch, descs: tuple[Any, ...]) -> KernelLibrary:
    library = _Library.current
    if library is None or descs[0].dtype != _REALS[library.index.real]:
        raise RuntimeError(f"{launch.operator.name} has no kernels for {descs[0].dtype}")
    return library


def _call(launch: Launch, descs: tuple[Any, ...], attributes: dict[str, int]) -> Call:
    """Sizes are told once TensorRT knows its profiles, -1 where they are known at run time only; symbols always."""
    by_name = {operand.name: desc for operand, desc in zip(launch.operator.inputs, descs, strict=True)}
    static = {name: list(desc.shape) for name, desc in by_name.items() if desc.has_shape}
    shapes = {name: list(desc.shape_expr) for name, desc in by_name.items()}
    return Call(static, attributes, shapes, trtp.ShapeExpr)


def _type(operand: Operand, real: trt.DataType) -> trt.DataType:
    return real if operand.type == "real" else _TYPES[operand.type]


def _type_name(dtype: trt.DataType) -> str:
    """As ``AutoTuneCombination`` spells it."""
    return str(_TYPE_NAMES.get(dtype, dtype.name))
