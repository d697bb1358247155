"""ModelOpt's INT4 AWQ (awq_lite; arXiv 2306.00978), calibrated over both attention patterns.

AWQ scales up important input channels before rounding. ModelOpt's export folds the scales of q/k/v and gate/up into the
RMSNorm before them. o_proj, down_proj and an int4 head keep theirs as ``pre_quant_scale``, which applies to the base
product only: the draft adapter of o_proj reads the unscaled input.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_hf_checkpoint
from numpy.typing import NDArray
from torch import Tensor

from trimode.common.progress import Progress
from trimode.model.checkpoint import HEAD, Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.quantize.attention_patterns import PatternLogits, both_patterns
from trimode.quantize.report import CalibrationReport
from trimode.quantize.safetensors_stream import TensorSpec, write_tensors

# Text on which logits are compared. 4 x 64 rows of 131072 float32 are 128 MiB for each pattern.
COMPARED_TEXTS = 4
COMPARED_TOKENS = 64


def write_awq(
    checkpoint: Checkpoint, folder: Path, texts: list[list[int]], group: int, int4_head: bool, progress: Progress
) -> list[PatternLogits]:
    """Calibrate on ``texts`` (token ids) and write the int4 tensors. Returns the original model's logits on some texts.

    Needs memory for the model in float32 (CPUs are 3 to 10 times slower in 16 bits) and for its export.
    """
    model = load_reference(checkpoint, adapter=False)
    before = _compared_logits(model, texts)
    steps = 2 * len(texts)  # awq_lite runs the loop twice: for activation statistics and for the search
    done = count(1)

    def forward_loop(model: NemotronLabsDiffusionModel) -> None:
        for text in texts:
            both_patterns(model, text)
            progress("calibrate", next(done), steps)

    with scratch_folder() as scratch:
        mtq.quantize(model, _modelopt_config(group, int4_head), forward_loop)
        exported = _export(model, scratch)
    del model
    arrays = {name: _as_stored(name, exported.pop(name), checkpoint) for name in sorted(exported)}
    write_tensors(folder, [TensorSpec(name, a.dtype, a.shape) for name, a in arrays.items()], arrays.values())
    return before


def calibration_report(quantized: Checkpoint, texts: list[list[int]], before: list[PatternLogits]) -> CalibrationReport:
    """Relative error of the written checkpoint's logits against the unquantised model's logits ``before``."""
    after = _compared_logits(load_reference(quantized, adapter=False), texts)
    return CalibrationReport(
        texts=len(texts),
        tokens=sum(map(len, texts)),
        causal_logit_error=_relative_error([a.causal for a in after], [b.causal for b in before]),
        bidirectional_logit_error=_relative_error([a.bidirectional for a in after], [b.bidirectional for b in before]),
    )


def _modelopt_config(group: int, int4_head: bool) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for rule in config["quant_cfg"]:
        if rule["quantizer_name"] == "*weight_quantizer":
            rule["cfg"]["block_sizes"][-1] = group
    if not int4_head:
        # By default only names like `lm_head` are excluded. The last rule wins.
        config["quant_cfg"].append({"quantizer_name": f"*{HEAD}*", "enable": False})
    return config


def _export(model: NemotronLabsDiffusionModel, scratch: Path) -> dict[str, Tensor]:
    """The tensors of ModelOpt's unified export, in memory.

    ModelOpt would write the unquantised tensors in float32, the type of the calibration.
    """
    exported: dict[str, Tensor] = {}

    def keep(folder: Path, *, state_dict: dict[str, Tensor], **_: Any) -> None:
        exported.update(state_dict)
        model.config.save_pretrained(folder)  # the export edits config.json afterwards

    model.save_pretrained = keep
    export_hf_checkpoint(model, export_dir=scratch)
    del model.save_pretrained  # it refers to the model: break the cycle
    return exported


def _as_stored(name: str, tensor: Tensor, checkpoint: Checkpoint) -> NDArray[Any]:
    """Packed weights and scales as exported; other tensors in the dtype of the checkpoint."""
    array: NDArray[Any] = tensor.detach().contiguous().numpy()
    if name.endswith(".weight_scale") or array.dtype == np.uint8:
        return array
    source = name.removesuffix(".pre_quant_scale") + ".weight" if name.endswith(".pre_quant_scale") else name
    return array.astype(checkpoint.vector(source).dtype)


def _compared_logits(model: NemotronLabsDiffusionModel, texts: list[list[int]]) -> list[PatternLogits]:
    return [both_patterns(model, text[:COMPARED_TOKENS]) for text in texts[:COMPARED_TEXTS]]


def _relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """|found - expected| / |expected|, Euclidean norm over all tensors together."""
    reference = torch.cat(expected)
    return float((torch.cat(found) - reference).norm() / reference.norm())


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that also receives all other temporary files: ModelOpt does not remove its own."""
    previous = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = previous
