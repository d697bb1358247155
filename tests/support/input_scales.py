"""AWQ's form of an int4 checkpoint, without its calibration: input scales at random."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from trimode.model.checkpoint import Checkpoint, linear_shapes


def write_input_scales(source: Path, out: Path) -> Path:
    """Copy the int4 checkpoint ``source``, and give the matrices that read no norm an input scale: between 0.5 and 2,
    another one for each channel.
    """
    shutil.copytree(source, out)
    file, checkpoint, random = out / "model.safetensors", Checkpoint(source), np.random.default_rng(0)
    tensors = load_file(file)
    stored = checkpoint.vector("encoder.norm.weight").dtype
    for module, (_, inner) in linear_shapes(checkpoint.config).items():
        if module.endswith(("o_proj", "down_proj")):
            tensors[f"{module}.pre_quant_scale"] = random.uniform(0.5, 2, inner).astype(stored)
    save_file(tensors, file, {"format": "pt"})
    return out
