"""Checkpoint to w4a16 checkpoint."""

from trimode.quantize.quantizing import quantize_checkpoint
from trimode.quantize.report import QuantizationReport

__all__ = ["QuantizationReport", "quantize_checkpoint"]
