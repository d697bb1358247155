"""Errors that quantisation caused: ``quantization_report.json`` in the quantised folder."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt

from trimode.common.progress import Progress
from trimode.model.checkpoint import Checkpoint, Int4Weight
from trimode.model.quantization import HeadFormat, Method
from trimode.quantize.row_slices import row_slices

REPORT_FILE = "quantization_report.json"


class CalibrationReport(BaseModel):
    """Amount of calibration text, and the relative L2 error of the logits on some of it, for each attention pattern."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts: PositiveInt
    tokens: PositiveInt
    causal_logit_error: NonNegativeFloat
    bidirectional_logit_error: NonNegativeFloat


class QuantizationReport(BaseModel):
    """``weight_error``: |W - quantised W| / |W| (Frobenius norm) of every int4 matrix, by module. Scales that AWQ
    folded into a norm are applied to W.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method
    group: PositiveInt
    head: HeadFormat
    weight_error: dict[str, NonNegativeFloat]
    calibration: CalibrationReport | None = None


def weight_errors(
    source: Checkpoint, quantized: Checkpoint, modules: list[str], progress: Progress
) -> dict[str, float]:
    """The relative error of each module's matrix, by module name."""
    errors = {}
    for done, module in enumerate(modules, start=1):
        after = quantized.linear(module)
        if not isinstance(after, Int4Weight):
            raise TypeError(f"{module} is {type(after).__name__}, not int4")
        before = source.vector(f"{module}.weight")
        errors[module] = _relative_error(before, after, _folded_scale(source, quantized, module))
        progress("compare", done, len(modules))
    return errors


def _relative_error(before: NDArray[Any], after: Int4Weight, folded_scale: NDArray[np.float32]) -> float:
    difference = total = 0.0
    for rows in row_slices(before.shape):
        expected = before[rows].astype(np.float32)
        packed = after.packed[rows.start // 2 : rows.stop // 2]
        found = Int4Weight(packed, after.scale[rows], after.input_scale).to_float32() * folded_scale
        difference += float(np.square(found - expected).sum(dtype=np.float64))
        total += float(np.square(expected).sum(dtype=np.float64))
    return math.sqrt(difference / total) if total else 0.0


def _folded_scale(source: Checkpoint, quantized: Checkpoint, module: str) -> NDArray[np.float32]:
    """The part of AWQ's input scale that was folded into the norm before the layer: [in], or [1] without a norm."""
    norm = norm_before(module)
    if norm is None:
        return np.ones(1, np.float32)
    before = source.vector(norm).astype(np.float32)
    after = quantized.vector(norm).astype(np.float32)
    # A channel that the norm sets to zero is zero before and after.
    return np.divide(after, before, out=np.ones_like(before), where=before != 0)


def norm_before(module: str) -> str | None:
    """The RMSNorm weight whose output a layer reads, if it reads one."""
    layer, _, projection = module.rpartition(".")
    if projection in ("q_proj", "k_proj", "v_proj"):
        return layer.removesuffix("self_attn") + "input_layernorm.weight"
    if projection in ("gate_proj", "up_proj"):
        return layer.removesuffix("mlp") + "post_attention_layernorm.weight"
    return None
