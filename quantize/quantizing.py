"""``trimode quantize``: a 16-bit checkpoint to ModelOpt's unified int4 checkpoint."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, get_args

from trimode.common.atomic_folder import atomic_folder
from trimode.common.errors import TriModeError
from trimode.common.progress import Progress, no_progress
from trimode.common.records import read_json
from trimode.model.checkpoint import ADAPTER_FOLDER, HEAD, SOURCE_NAME, Checkpoint, linear_shapes
from trimode.model.quantization import QUANT_CONFIG_FILE, HeadFormat, Method
from trimode.model.tokenizer import Tokenizer
from trimode.quantize.calibration import calibration_tokens
from trimode.quantize.companions import copy_companions, write_json
from trimode.quantize.methods import METHODS, Task
from trimode.quantize.modelopt_format import (
    excluded_modules,
    hf_quant_config,
    quantization_config,
)
from trimode.quantize.report import REPORT_FILE, QuantizationReport, weight_errors

DEFAULT_GROUP, MIN_GROUP = 128, 16


def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    method: Method,
    group: int = DEFAULT_GROUP,
    head: HeadFormat = "16bit",
    calibration: Path | None = None,
    progress: Progress = no_progress,
) -> QuantizationReport:
    """Write the checkpoint to the folder ``out`` with int4 linear layers. After an error, there is no folder.

    group: input channels that share a scale. method: ``awq`` needs the extra ``build`` and calibration text (JSONL; the
    checkpoint's own ``calibration.jsonl`` if None); ``rtn`` needs neither. The adapter and the embedding are copied;
    so is the head unless ``head`` is ``int4``. AWQ rescales the norms. Raises TriModeError.
    """
    _check_options(checkpoint, method, group, head, calibration)
    modules = [module for module in linear_shapes(checkpoint.config) if head == "int4" or module != HEAD]
    _check_shapes(checkpoint, modules, group)
    _check_what_is_copied(checkpoint)
    chosen = METHODS[method]
    texts = calibration_tokens(checkpoint, calibration) if chosen.calibrated else []
    with atomic_folder(out) as folder:
        copy_companions(checkpoint.folder, folder)
        if checkpoint.adapter is not None:
            shutil.copytree(checkpoint.folder / ADAPTER_FOLDER, folder / ADAPTER_FOLDER)
        write_json(folder / "config.json", _config(checkpoint, head))
        write_json(folder / QUANT_CONFIG_FILE, hf_quant_config(group, excluded_modules(head == "int4")))
        calibrated = chosen.write(Task(checkpoint, modules, group, texts), folder, progress)
        report = QuantizationReport(
            method=method,
            group=group,
            head=head,
            weight_error=weight_errors(checkpoint, Checkpoint(folder), modules, progress),
            calibration=calibrated,
        )
        (folder / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return report


def fitting_group(checkpoint: Checkpoint) -> int:
    """The default group, or the largest smaller power of two that divides every int4 matrix's input channels."""
    columns = (shape[1] for module, shape in linear_shapes(checkpoint.config).items() if module != HEAD)
    return math.gcd(DEFAULT_GROUP, *columns)


def _check_options(checkpoint: Checkpoint, method: Method, group: int, head: str, calibration: Path | None) -> None:
    for option, value, allowed in (("--method", method, get_args(Method)), ("--head", head, get_args(HeadFormat))):
        if value not in allowed:
            raise TriModeError(f"{option} {value} is unknown; give one of {', '.join(allowed)}")
    if group < MIN_GROUP or group & (group - 1):
        raise TriModeError(f"--group {group}: a group is a power of two, at least {MIN_GROUP} (128 is usual)")
    if calibration is not None and not METHODS[method].calibrated:
        others = " or ".join(name for name, other in METHODS.items() if other.calibrated)
        raise TriModeError(
            f"--calibration {calibration}: --method {method} uses none; leave it out, or use --method {others}"
        )
    if checkpoint.quantization is not None:
        raise TriModeError(f"{checkpoint.folder} is int4 already; give the 16-bit checkpoint it was made from")


def _check_shapes(checkpoint: Checkpoint, modules: list[str], group: int) -> None:
    shapes = linear_shapes(checkpoint.config)
    for module in modules:
        rows, columns = shapes[module]
        if rows % 2:
            remedy = "use --head 16bit" if module == HEAD else "the checkpoint cannot be int4"
            raise TriModeError(f"{checkpoint.folder}: {module} has {rows} rows, and int4 packs pairs; {remedy}")
        if columns % group:
            fitting = math.gcd(group, *(shapes[name][1] for name in modules))
            remedy = f"use --group {fitting}" if fitting >= MIN_GROUP else "the checkpoint cannot be int4"
            raise TriModeError(
                f"{checkpoint.folder}: {module} has {columns} columns, not a multiple of {group}; {remedy}"
            )


def _check_what_is_copied(checkpoint: Checkpoint) -> None:
    """Read the tokenizer and the adapter, which quantisation only copies, so that faults are found now."""
    Tokenizer.from_folder(checkpoint.folder)
    if checkpoint.adapter is not None:
        for layer in range(checkpoint.config.num_hidden_layers):
            checkpoint.adapter.matrices(layer)


def _config(checkpoint: Checkpoint, head: str) -> dict[str, Any]:
    config: dict[str, Any] = read_json(checkpoint.folder / "config.json")
    return config | {
        SOURCE_NAME: checkpoint.name,
        "quantization_config": quantization_config(excluded_modules(head == "int4")),
    }
