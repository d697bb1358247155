"""A checkpoint for quantisation, with channels of different size and calibration text, and its quantised forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint


@pytest.fixture(scope="session")
def source(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The random checkpoint with smaller weights, so that rounding changes its logits less. Input channels differ in
    size, as in a trained network (by norms, and by ``v_proj`` before ``o_proj``). The adapter changes the drafts.
    """
    folder = tmp_path_factory.mktemp("quantize") / "source"
    shutil.copytree(random_checkpoint, folder)
    random = np.random.default_rng(0)

    def changed(name: str, weight: NDArray[Any]) -> NDArray[Any]:
        if "v_proj" in name:
            rows = np.exp(1.5 * random.standard_normal((len(weight), 1), np.float32))
            return weight * (rows / np.sqrt(np.square(rows).mean()))
        if "norm" in name:
            return weight * np.exp(0.7 * random.standard_normal(weight.shape, np.float32))
        calm = any(projection in name for projection in ("q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"))
        return weight * (0.3 if calm else 2.0 if "lora_B" in name else 1.0)

    for file in (folder / "model.safetensors", folder / "linear_spec_lora" / "adapter_model.safetensors"):
        weights = load_file(file)
        scaled = {
            name: changed(name, weight.astype(np.float32)).astype(weight.dtype) for name, weight in weights.items()
        }
        save_file(scaled, file, {"format": "pt"})
    chats = [[("user", f"{n} and {n}?"), ("assistant", f"{2 * n}, surely; nothing else will do.")] for n in range(4, 8)]
    lines = [json.dumps({"messages": [{"role": role, "content": content} for role, content in chat]}) for chat in chats]
    text = {"text": "Plain text of some length, so that there is more than one block of it to go through."}
    (folder / "calibration.jsonl").write_text("\n".join([*lines, json.dumps(text)]))
    return Checkpoint(folder)


@pytest.fixture(scope="session")
def rounded(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Round to nearest; the head is not quantised."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    quantize_checkpoint(source, out, method="rtn")
    return Checkpoint(out)


@pytest.fixture(scope="session")
def awq(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """AWQ; the head is not quantised."""
    out = tmp_path_factory.mktemp("awq") / "out"
    quantize_checkpoint(source, out, method="awq")
    return Checkpoint(out)


@pytest.fixture(scope="session")
def awq_with_head(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """AWQ in groups of 64; the head is int4 too."""
    out = tmp_path_factory.mktemp("awq_with_head") / "out"
    quantize_checkpoint(source, out, method="awq", group=64, head="int4")
    return Checkpoint(out)
