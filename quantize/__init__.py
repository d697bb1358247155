"""Checkpoint to checkpoint: w4a16, and the forms that other programs read."""

from trimode.quantize.quantizing import quantize_checkpoint
from trimode.quantize.report import QuantizationReport
from trimode.quantize.trtllm_export import ExportReport, export_trtllm

__all__ = ["ExportReport", "QuantizationReport", "export_trtllm", "quantize_checkpoint"]
