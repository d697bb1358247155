"""``quantize_checkpoint``: refusals, copied files, and a complete folder or none."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.random_checkpoint import write_random_checkpoint
from trimode.common.errors import TriModeError
from trimode.model.checkpoint import HEAD, Checkpoint
from trimode.model.quantization import Method
from trimode.quantize import METHODS, QuantizationReport, quantize_checkpoint, safetensors_stream


def changed_copy(source: Checkpoint, folder: Path, drop: tuple[str, ...] = (), **arrays: np.ndarray) -> Checkpoint:
    shutil.copytree(source.folder, folder)
    for name in drop:
        (folder / name).unlink()
    if arrays:
        save_file(load_file(folder / "model.safetensors") | arrays, folder / "model.safetensors")
    return Checkpoint(folder)


def test_only_the_companion_files_are_copied(source: Checkpoint, tmp_path: Path) -> None:
    original = changed_copy(source, tmp_path / "original")
    for name in (
        "generation_config.json",
        "LICENSE.txt",
        "modeling_remote.py",
        "training.bin",
        "model.safetensors.bak",
    ):
        (original.folder / name).write_text("{}")
    quantize_checkpoint(original, tmp_path / "out", method="rtn")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("LICENSE.txt", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("config.json", "hf_quant_config.json", "model.safetensors", "quantization_report.json", "linear_spec_lora"),
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_algo"] == "W4A16_AWQ"
    assert config.pop("base_model") == "original"
    assert config == json.loads((original.folder / "config.json").read_text())


def test_a_sharded_source_leaves_no_stale_index(source: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(source.folder, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    specs = [safetensors_stream.TensorSpec(name, array.dtype, array.shape) for name, array in weights.items()]
    safetensors_stream.write_tensors(folder, specs, weights.values(), shard_bytes=200_000)
    quantize_checkpoint(Checkpoint(folder), tmp_path / "out", method="rtn")
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert Checkpoint(tmp_path / "out").is_int4("encoder.layers.0.mlp.up_proj")


def test_progress_counts_every_stage_to_its_end(source: Checkpoint, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = quantize_checkpoint(
        source, tmp_path / "out", method="rtn", progress=lambda stage, done, total: calls.append((stage, done, total))
    )
    expected = [(stage, done, 14) for stage in ("quantize", "compare") for done in range(1, 15)]
    assert calls == expected
    assert report == QuantizationReport.model_validate_json((tmp_path / "out" / "quantization_report.json").read_text())


def test_awq_reports_progress_and_prints_nothing_else(
    source: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        print(f"{stage} {done}/{total}")

    quantize_checkpoint(source, tmp_path / "out", method="awq", progress=progress)
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines() == [f"calibrate {n}/10" for n in range(1, 11)] + [f"compare {n}/14" for n in range(1, 15)]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"method": "gptq"}, "--method gptq is unknown; give one of awq, rtn"),
        ({"method": "rtn", "head": "fp8"}, "--head fp8 is unknown; give one of int4, 16bit"),
        ({"method": "rtn", "group": 100}, "--group 100: a group is a power of two"),
        ({"method": "rtn", "group": 8}, "--group 8: "),
        ({"method": "rtn", "group": 0}, "--group 0: "),
        ({"method": "rtn", "group": 256}, r"q_proj has 128 columns, not a multiple of 256; use --group 128$"),
        ({"method": "rtn", "calibration": Path("x.jsonl")}, "--calibration x.jsonl: --method rtn uses none"),
        ({"method": "awq", "calibration": Path("nowhere.jsonl")}, "nowhere.jsonl is missing"),
    ],
)
def test_options_are_refused_before_any_work(
    source: Checkpoint, tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(TriModeError, match=complaint):
        quantize_checkpoint(source, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_shapes_that_cannot_be_int4_are_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_random_checkpoint(tmp_path / "odd", vocab_size=767, intermediate_size=96))
    with pytest.raises(TriModeError, match=r"down_proj has 96 columns, not a multiple of 64; use --group 32$"):
        quantize_checkpoint(checkpoint, tmp_path / "out", method="rtn", group=64)
    with pytest.raises(TriModeError, match=r"diffusion_head has 767 rows, and int4 packs pairs; use --head 16bit$"):
        quantize_checkpoint(checkpoint, tmp_path / "out", method="rtn", group=32, head="int4")
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
    quantize_checkpoint(checkpoint, tmp_path / "out", method="rtn", group=32)


def test_awq_without_calibration_text_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    bare = changed_copy(source, tmp_path / "bare", drop=("calibration.jsonl",))
    with pytest.raises(TriModeError, match=r"calibration\.jsonl is missing; give --calibration FILE"):
        quantize_checkpoint(bare, tmp_path / "out", method="awq")


def test_an_int4_checkpoint_is_refused(rounded: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(TriModeError, match="is int4 already; give the 16-bit checkpoint"):
        quantize_checkpoint(rounded, tmp_path / "out", method="rtn")


def poison(file: str, tensor: str) -> Callable[[Path], None]:
    """One NaN."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        tensors[tensor][3, 5] = np.nan
        save_file(tensors, folder / file)

    return apply


LORA = "base_model.model.encoder.layers.1.self_attn.o_proj.lora_{}.weight"
ADAPTER = "linear_spec_lora/adapter_model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weight": (poison("model.safetensors", f"{HEAD}.weight"), f"tensor {HEAD}.weight holds 1 NaN"),
    "adapter's A": (poison(ADAPTER, LORA.format("A")), "lora_A.weight holds 1 NaN"),
    "adapter's B": (poison(ADAPTER, LORA.format("B")), "lora_B.weight holds 1 NaN"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "no tokenizer's file": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
}


@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(
    source: Checkpoint, tmp_path: Path, damage: str, method: Any
) -> None:
    apply, complaint = DAMAGE[damage]
    apply(Path(shutil.copytree(source.folder, tmp_path / "damaged")))
    with pytest.raises(TriModeError, match=complaint):
        quantize_checkpoint(Checkpoint(tmp_path / "damaged"), tmp_path / "out", method=method)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_the_error_for_missing_packages_of_awq_names_the_remedy(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "trimode.quantize.awq", raising=False)
    monkeypatch.delattr("trimode.quantize.awq", raising=False)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(TriModeError, match=r"--method awq needs modelopt.*: pip install 'trimode\[build\]', or use"):
        quantize_checkpoint(source, tmp_path / "out", method="awq")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_changed(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(TriModeError, match=r"out exists already; give another folder, or remove it first"):
        quantize_checkpoint(source, tmp_path / "out", method="rtn")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_the_error_for_an_unwritable_folder_names_it(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TriModeError, match=r"file/out cannot be written: "):
        quantize_checkpoint(source, tmp_path / "file" / "out", method="rtn")


def test_an_empty_folder_and_missing_parents_are_accepted(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "not" / "yet" / "there"):
        quantize_checkpoint(source, out, method="rtn")
        Checkpoint(out)


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), TriModeError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk full", "other", "interrupt"],
)
def test_a_failure_half_way_leaves_nothing(
    source: Checkpoint, tmp_path: Path, fault: BaseException, raised: type[BaseException]
) -> None:
    seen: list[str] = []

    def progress(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("quantize", 5):
            seen.extend(path.name for path in tmp_path.rglob("*.safetensors") if path.parent.parent == tmp_path)
            raise fault

    with pytest.raises(raised) as caught:
        quantize_checkpoint(source, tmp_path / "out", method="rtn", progress=progress)
    assert seen == ["model.safetensors"], "the fault came while the weights were being written"
    assert not list(tmp_path.iterdir())
    if raised is TriModeError:
        assert str(caught.value) == (
            f"{tmp_path / 'out'}: the disk is full; nothing was kept. Free some space, or write elsewhere"
        )


def test_every_method_is_registered() -> None:
    assert set(METHODS) == set(get_args(Method))
