"""AWQ checkpoints: equal to ModelOpt's export, more accurate than rounding, and correct with an unquantised adapter."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from trimode.model.checkpoint import HEAD, Checkpoint, DenseWeight, Int4Weight, linear_shapes
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.quantize.attention_patterns import both_patterns
from trimode.quantize.awq import scratch_folder
from trimode.quantize.calibration import calibration_tokens
from trimode.quantize.report import QuantizationReport

O_PROJ = "encoder.layers.{}.self_attn.o_proj"


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def drafts(model: NemotronLabsDiffusionModel, tokens: list[int], adapter: bool = True) -> Tensor:
    """Bidirectional logits of a draft pass of self-speculation."""
    with model.draft_adapter(adapter):
        return both_patterns(model, tokens).bidirectional


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    """Not among the calibration texts."""
    return torch.randint(0, 256, (65,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def modelopt_export(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ModelOpt's AWQ of the same model on the same passes, written in float32 by its own exporter."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    out = tmp_path_factory.mktemp("modelopt_awq")
    model = load_reference(source, adapter=False)
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    config["quant_cfg"].append({"quantizer_name": f"*{HEAD}*", "enable": False})
    texts = calibration_tokens(source, None)
    mtq.quantize(model, config, lambda model: [both_patterns(model, text) for text in texts])
    export_hf_checkpoint(model, export_dir=out)
    return out


def test_tensors_equal_modelopts_in_the_dtype_of_the_checkpoint(
    source: Checkpoint, awq: Checkpoint, modelopt_export: Path
) -> None:
    ours, theirs = load_file(awq.folder / "model.safetensors"), load_file(modelopt_export / "model.safetensors")
    assert ours.keys() == theirs.keys()
    stored = source.vector("encoder.norm.weight").dtype
    for name, array in theirs.items():
        kept = array.dtype == np.uint8 or name.endswith(".weight_scale")
        assert ours[name].dtype == (array.dtype if kept else stored), name
        assert np.array_equal(ours[name], array.astype(ours[name].dtype)), name


def test_the_quantisation_file_equals_modelopts(awq: Checkpoint, modelopt_export: Path) -> None:
    ours, theirs = (_quantisation_json(folder) for folder in (awq.folder, modelopt_export))
    assert ours == theirs


def test_the_head_is_quantised_only_on_request(source: Checkpoint, awq: Checkpoint, awq_with_head: Checkpoint) -> None:
    kept, quantized = awq.linear(HEAD), awq_with_head.linear(HEAD)
    assert isinstance(kept, DenseWeight)
    assert np.array_equal(kept.array, source.vector(f"{HEAD}.weight"))
    assert isinstance(quantized, Int4Weight)
    assert 0.05 < relative_error(_matrix(awq_with_head, HEAD), _matrix(source, HEAD)) < 0.2
    modules = set(linear_shapes(source.config))
    assert {module for module in modules if awq.is_int4(module)} == modules - {HEAD}
    assert {module for module in modules if awq_with_head.is_int4(module)} == modules


def test_matrices_have_the_requested_group(awq: Checkpoint, awq_with_head: Checkpoint) -> None:
    for checkpoint, group in ((awq, 128), (awq_with_head, 64)):
        weight = checkpoint.linear("encoder.layers.0.mlp.down_proj")
        assert isinstance(weight, Int4Weight)
        assert weight.scale.shape == (128, 384 // group)


def test_logits_are_close_to_the_unquantised_ones_in_both_patterns(
    source: Checkpoint, awq: Checkpoint, awq_with_head: Checkpoint, tokens: list[int]
) -> None:
    expected = both_patterns(load_reference(source, adapter=False), tokens)
    for checkpoint in (awq, awq_with_head):
        found = both_patterns(load_reference(checkpoint, adapter=False), tokens)
        for f, e in zip(found, expected, strict=True):
            assert relative_error(f, e) < 0.25


def test_awq_loses_less_than_rounding_where_channels_differ(
    source: Checkpoint, rounded: Checkpoint, awq: Checkpoint
) -> None:
    """o_proj's inputs have large and small channels here; what counts is the error of its output."""
    model = load_reference(source, adapter=False)
    texts = calibration_tokens(source, None)
    for layer in range(2):
        module = O_PROJ.format(layer)
        inputs: list[Tensor] = []
        hook = model.get_submodule(module).register_forward_hook(lambda _m, args, _o, kept=inputs: kept.append(args[0]))
        for text in texts:
            both_patterns(model, text)
        hook.remove()
        x = torch.cat([part.flatten(0, 1) for part in inputs])
        expected = x @ _matrix(source, module).T
        losses = [relative_error(x @ _matrix(c, module).T, expected) for c in (awq, rounded)]
        assert losses[0] < 0.85 * losses[1]


def test_the_adapter_reads_the_unscaled_input(source: Checkpoint, awq: Checkpoint, tokens: list[int]) -> None:
    """With the adapter on, drafts stay near the unquantised model's, unless the adapter reads the rescaled input."""
    expected = drafts(load_reference(source), tokens)
    without = relative_error(drafts(load_reference(source), tokens, adapter=False), expected)
    right = relative_error(drafts(load_reference(awq), tokens), expected)
    wrong = relative_error(drafts(_with_adapter_on_rescaled_input(awq), tokens), expected)
    assert without > 0.3, "the adapter changes too little for a meaningful test"
    assert right < 0.2
    assert wrong > 2 * right


def test_the_adapter_is_copied_byte_for_byte(source: Checkpoint, awq: Checkpoint) -> None:
    assert awq.adapter is not None
    files = sorted(
        path.relative_to(source.folder) for path in (source.folder / "linear_spec_lora").rglob("*") if path.is_file()
    )
    assert len(files) >= 2
    for file in files:
        assert (awq.folder / file).read_bytes() == (source.folder / file).read_bytes()


def test_the_report_has_the_measured_errors(source: Checkpoint, awq: Checkpoint) -> None:
    report = QuantizationReport.model_validate_json((awq.folder / "quantization_report.json").read_text())
    assert (report.method, report.group, report.head) == ("awq", 128, "16bit")
    assert report.weight_error.keys() == {module for module in linear_shapes(source.config) if module != HEAD}
    for module, error in report.weight_error.items():
        # The part of the scale that moved into the norm counts: without it, the error would be 0.5 and more. o_proj's
        # error by weight is high on purpose: AWQ lets its small inputs' weights bear it.
        assert 0.05 < error < (0.6 if module.endswith("o_proj") else 0.2), module
    assert report.calibration is not None
    assert report.calibration.texts == 5
    assert 0.01 < report.calibration.causal_logit_error < 0.2
    assert 0.01 < report.calibration.bidirectional_logit_error < 0.2


def test_temporary_files_of_modelopt_are_removed() -> None:
    usual = tempfile.gettempdir()
    with scratch_folder() as folder:
        with tempfile.NamedTemporaryFile(delete=False) as left:
            pass
        assert Path(left.name).parent == folder
    assert not folder.exists()
    assert tempfile.gettempdir() == usual


def _quantisation_json(folder: Path) -> tuple[Any, Any]:
    files = [json.loads((folder / name).read_text()) for name in ("hf_quant_config.json", "config.json")]
    return files[0], files[1]["quantization_config"]


def _matrix(checkpoint: Checkpoint, module: str) -> Tensor:
    return torch.from_numpy(checkpoint.linear(module).to_float32())


def _with_adapter_on_rescaled_input(checkpoint: Checkpoint) -> NemotronLabsDiffusionModel:
    model = load_reference(checkpoint)
    for layer in range(2):
        weight = checkpoint.linear(O_PROJ.format(layer))
        assert isinstance(weight, Int4Weight)
        assert weight.input_scale is not None
        model.get_submodule(O_PROJ.format(layer)).lora_A["default"].weight.data *= torch.from_numpy(weight.input_scale)
    return model
