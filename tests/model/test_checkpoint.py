"""Opening a checkpoint: missing, surplus, misshapen and damaged files and tensors are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trimode.common.errors import TriModeError
from trimode.model.checkpoint import Checkpoint, open_checkpoint
from trimode.model.tokenizer import Tokenizer

UP = "encoder.layers.1.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(random_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))


def edit(change: Callable[[dict[str, np.ndarray]], object], file: str = WEIGHTS) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return apply


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def escape(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: "../secret.safetensors"}}))


def shard(stale: str | None = None) -> Callable[[Path], object]:
    """Two files and an index in place of the single file, and optionally a stale file."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        names = sorted(tensors)
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-{number:05}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / WEIGHTS).rename(folder / (stale or "consolidated.safetensors"))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return apply


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"config\.json is missing; give a checkpoint of the Nemotron-Labs-Diffusion family",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"model\.safetensors is missing"),
    "truncated": (truncate, r"model\.safetensors is not a complete safetensors file"),
    "missing tensor": (edit(lambda tensors: tensors.pop(UP)), f"lacks 1 tensor.*{UP}"),
    "surplus tensor": (edit(lambda tensors: tensors.update(extra=np.zeros(2, np.float32))), "has, unlike .*extra"),
    "wrong shape": (
        edit(lambda tensors: tensors.update({UP: np.zeros((384, 64), ml_dtypes.bfloat16)})),
        rf"{UP} has shape \[384, 64\], the config requires \[384, 128\]",
    ),
    "wrong type": (edit(lambda tensors: tensors.update({UP: np.zeros((384, 128), np.int32)})), f"{UP} is I32"),
    "a quantised matrix, unstated": (
        edit(lambda tensors: tensors.update({UP: np.zeros((192, 128), np.uint8)})),
        rf"is quantised \({UP} is U8\), but has neither hf_quant_config\.json nor quantization_config in config\.json",
    ),
    "path that leaves": (escape, "not a plain file name"),
    "two sets of weights": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "model-1.safetensors"}}'
        ),
        r"two sets of weights, model\.safetensors and model\.safetensors\.index\.json; remove the stale one",
    ),
    "adapter of another rank": (
        lambda folder: (folder / "linear_spec_lora/adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}'),
        "lora_A",
    ),
    "adapter on another module": (
        lambda folder: (folder / "linear_spec_lora/adapter_config.json").write_text(
            '{"r": 8, "lora_alpha": 32, "target_modules": ["q_proj"]}'
        ),
        "target_modules",
    ),
    "a shard that the index does not list": (
        shard(stale="model-00003-of-00002.safetensors"),
        r"two sets of weights, model-00003-of-00002\.safetensors and model\.safetensors\.index\.json; remove the stale",
    ),
    "a shard beside a single file": (
        lambda folder: shutil.copyfile(folder / WEIGHTS, folder / "model-00001-of-00002.safetensors"),
        r"two sets of weights, model-00001-of-00002\.safetensors and model\.safetensors; remove the stale one",
    ),
    "shards without an index": (
        lambda folder: (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors"),
        r"index\.json is missing; it lists the tensors of model-00001-of-00002\.safetensors",
    ),
    "an index that is a list": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        r"index\.json: a JSON object is expected",
    ),
    "unknown quantisation": (
        lambda folder: (folder / "hf_quant_config.json").write_text(
            '{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}'
        ),
        "quant_algo",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_refused_by_name(copy: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(copy)
    with pytest.raises(TriModeError, match=message) as caught:
        Checkpoint(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_refused_when_it_is_read(copy: Path, value: float) -> None:
    def poison(tensors: dict[str, np.ndarray]) -> None:
        tensors[UP][3, 5] = value

    edit(poison)(copy)
    checkpoint = Checkpoint(copy)
    checkpoint.linear("encoder.layers.0.mlp.up_proj")
    with pytest.raises(TriModeError, match=f"{UP} holds 1 NaN or infinite"):
        checkpoint.linear("encoder.layers.1.mlp.up_proj")


def test_shards_are_the_same_checkpoint(copy: Path, random_checkpoint: Path) -> None:
    shard()(copy)
    whole = dict(Checkpoint(random_checkpoint).tensors())
    sharded = dict(Checkpoint(copy).tensors())
    assert whole.keys() == sharded.keys()
    assert all(np.array_equal(whole[name], sharded[name]) for name in whole)


FOREIGN = (
    "README.md",
    ".gitattributes",
    ".DS_Store",
    "._config.json",
    "._model.safetensors",
    ".nfs000000000000000100000001",
    ".cache/huggingface/.gitignore",
    ".cache/huggingface/download/model.safetensors.metadata",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "modeling_nemotron_labs_diffusion.py",
    "additional_chat_templates/.DS_Store",
    "linear_spec_lora/README.md",
    "linear_spec_lora/.DS_Store",
)


def add_foreign(folder: Path) -> None:
    for path in FOREIGN:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"\x00\xff")


def hub_cache(source: Path, root: Path) -> Path:
    """A copy in the layout of huggingface_hub's cache: links to blobs with other names."""
    snapshot, blobs = root / "snapshots/abc", root / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in source.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


def test_foreign_files_that_nothing_reads_do_no_harm(copy: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    add_foreign(copy)
    whole = dict(Checkpoint(random_checkpoint).tensors())
    for folder in (copy, hub_cache(copy, tmp_path / "cache")):
        found = Checkpoint(folder)
        assert found.adapter is not None
        assert all(np.array_equal(whole[name], tensor) for name, tensor in found.tensors())
        Tokenizer.from_folder(folder)


def test_byte_order_marks(copy: Path) -> None:
    for path in copy.rglob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Checkpoint(copy).adapter is not None


def test_neither_folder_nor_reachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TriModeError, match="nobody/nothing is not a local folder, and downloading it failed"):
        open_checkpoint("nobody/nothing")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TriModeError, match="is not a folder"):
        open_checkpoint(tmp_path / "absent")
