"""Round to nearest equals ModelOpt's, bit for bit, in bounded memory and without torch."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from trimode.model.checkpoint import HEAD, Checkpoint, DenseWeight, Int4Weight, linear_shapes, vector_shapes
from trimode.model.config import ModelConfig
from trimode.model.reference.loading import load_reference
from trimode.quantize import QuantizationReport, quantize_checkpoint, row_slices
from trimode.quantize.safetensors_stream import TensorSpec, write_tensors


@pytest.fixture(scope="module")
def modelopt_export(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ModelOpt's own round to nearest of the same checkpoint, written by its own exporter."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    out = tmp_path_factory.mktemp("modelopt_rtn")
    model = load_reference(source, dtype=torch.bfloat16, adapter=False)
    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    config["quant_cfg"].append({"quantizer_name": f"*{HEAD}*", "enable": False})
    mtq.quantize(model, config)
    export_hf_checkpoint(model, export_dir=out)
    return out


def test_tensors_equal_modelopts_bit_for_bit(rounded: Checkpoint, modelopt_export: Path) -> None:
    ours = load_file(rounded.folder / "model.safetensors")
    theirs = load_file(modelopt_export / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert sum(array.dtype == np.uint8 for array in ours.values()) == 14
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        assert np.array_equal(ours[name], array), name


def test_the_quantisation_file_equals_modelopts(rounded: Checkpoint, modelopt_export: Path) -> None:
    ours, theirs = (
        [json.loads((folder / name).read_text()) for name in ("hf_quant_config.json", "config.json")]
        for folder in (rounded.folder, modelopt_export)
    )
    assert ours[0] == theirs[0]
    assert ours[1]["quantization_config"] == theirs[1]["quantization_config"]


def test_other_tensors_are_unchanged(source: Checkpoint, rounded: Checkpoint) -> None:
    for name in (*vector_shapes(source.config), f"{HEAD}.weight"):
        assert np.array_equal(source.vector(name), rounded.vector(name))
        assert source.vector(name).dtype == rounded.vector(name).dtype


def test_no_weight_changes_by_more_than_half_a_step(source: Checkpoint, rounded: Checkpoint) -> None:
    for module in linear_shapes(source.config):
        before, after = source.linear(module), rounded.linear(module)
        if module == HEAD:
            assert isinstance(after, DenseWeight)
            continue
        assert isinstance(after, Int4Weight)
        step = np.repeat(after.scale, before.to_float32().shape[1] // after.scale.shape[1], axis=1)
        assert np.all(np.abs(after.to_float32() - before.to_float32()) <= step * 0.5001), module


def test_an_int4_head(source: Checkpoint, tmp_path: Path) -> None:
    report = quantize_checkpoint(source, tmp_path / "out", method="rtn", group=64, head="int4")
    quantized = Checkpoint(tmp_path / "out")
    head = quantized.linear(HEAD)
    assert isinstance(head, Int4Weight)
    assert head.scale.shape == (source.config.vocab_size, 2)
    assert 0.05 < report.weight_error[HEAD] < 0.15
    load_reference(quantized)


def test_torch_is_not_imported(random_checkpoint: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from trimode.model.checkpoint import Checkpoint; from trimode.quantize import quantize_checkpoint\n"
        "source, out = map(Path, sys.argv[1:])\n"
        "quantize_checkpoint(Checkpoint(source), out, method='rtn')\n"
        "assert not {'torch', 'transformers', 'modelopt'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, random_checkpoint, tmp_path / "out"], check=True)


def test_the_number_of_slices_does_not_change_the_files(
    source: Checkpoint, rounded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default each matrix here is one slice. With many slices, the last one shorter, the files are the same."""
    monkeypatch.setattr(row_slices, "SLICE_ELEMENTS", 1300)
    assert [len(range(64)[rows]) for rows in row_slices.row_slices((64, 128))] == [10] * 6 + [4]
    report = quantize_checkpoint(source, tmp_path / "out", method="rtn")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (rounded.folder / "model.safetensors").read_bytes()
    whole = QuantizationReport.model_validate_json((rounded.folder / "quantization_report.json").read_text())
    assert report.weight_error == pytest.approx(whole.weight_error, rel=1e-6)


def test_memory_is_bounded_by_the_largest_tensor(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound: the largest tensor as stored, its int4 copy, and slices that are small in proportion to it."""
    monkeypatch.setattr(row_slices, "SLICE_ELEMENTS", 1 << 15)
    folder = tmp_path / "large"
    folder.mkdir()
    config = json.loads((random_checkpoint / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 5, "num_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(random_checkpoint / "tokenizer.json", folder / "tokenizer.json")
    model_config = ModelConfig.model_validate(config)
    shapes = {f"{module}.weight": shape for module, shape in linear_shapes(model_config).items()}
    shapes |= vector_shapes(model_config)
    dtype = np.dtype(ml_dtypes.bfloat16)
    random = np.random.default_rng(0)
    specs = [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]
    write_tensors(folder, specs, (random.standard_normal(spec.shape, np.float32).astype(dtype) for spec in specs))
    checkpoint = Checkpoint(folder)
    total, largest = sum(spec.bytes for spec in specs), max(spec.bytes for spec in specs)
    assert total > 16 * largest

    tracemalloc.start()
    quantize_checkpoint(checkpoint, tmp_path / "out", method="rtn")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert largest < peak < 4 * largest
