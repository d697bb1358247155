"""A checkpoint whose weights are drawn when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.gpu.random_w4a16_checkpoint import DrawnCheckpoint
from trimode.model.checkpoint import Checkpoint, Int4Weight
from trimode.quantize import quantize_checkpoint


def test_it_is_a_checkpoint_that_can_be_quantised(tmp_path: Path) -> None:
    """A tensor is the same whenever it is read, and others differ from it. No file holds the weights."""
    drawn = DrawnCheckpoint(tmp_path / "tiny", "tiny", layers=2)
    assert not list((tmp_path / "tiny").glob("*.safetensors"))
    first, again = dict(drawn.tensors()), dict(drawn.tensors())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    up, other = (f"encoder.layers.{layer}.mlp.up_proj.weight" for layer in range(2))
    assert not np.array_equal(first[up], first[other])
    report = quantize_checkpoint(drawn, tmp_path / "int4", method="rtn", head="int4")
    assert len(report.weight_error) == 2 * 7 + 1
    assert 0 < min(report.weight_error.values()) <= max(report.weight_error.values()) < 0.15
    quantised = Checkpoint(tmp_path / "int4")
    assert quantised.config.num_hidden_layers == 2
    assert isinstance(quantised.linear("diffusion_head"), Int4Weight)
