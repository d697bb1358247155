"""Checkpoint to checkpoint: w4a16 quantisation, and export for other programs."""

from trimode.common.openmp import configure_openmp
from trimode.quantize.calibration import CALIBRATION_FILE
from trimode.quantize.methods import METHODS
from trimode.quantize.quantizing import fitting_group, quantize_checkpoint
from trimode.quantize.report import QuantizationReport
from trimode.quantize.trtllm_export import ExportReport, export_trtllm

__all__ = [
    "CALIBRATION_FILE",
    "METHODS",
    "ExportReport",
    "QuantizationReport",
    "export_trtllm",
    "fitting_group",
    "quantize_checkpoint",
]

configure_openmp()  # before AWQ imports torch
