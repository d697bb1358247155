"""ModelOpt's statement of how a checkpoint is quantised: in either file, per matrix, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trimode.common.errors import TriModeError
from trimode.model.checkpoint import HEAD, Checkpoint, Int4Weight, linear_shapes
from trimode.quantize import quantize_checkpoint

Change = Callable[[Path], object]
Q, UP = "encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.up_proj"
GROUPS = {"group_0": {"weights": {"dynamic": False, "num_bits": 4, "type": "int", "group_size": 32}}}


@pytest.fixture(scope="module")
def int4(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All matrices but the head's are int4, in groups of 32."""
    out = tmp_path_factory.mktemp("quantised") / "int4"
    quantize_checkpoint(Checkpoint(random_checkpoint), out, method="rtn", group=32)
    return out


@pytest.fixture
def copy(int4: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(int4, tmp_path / "copy"))


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def stated(**fields: Any) -> Change:
    """Change the statement of ``hf_quant_config.json``."""
    return edit("hf_quant_config.json", lambda content: content["quantization"].update(fields))


def section(**fields: Any) -> Change:
    """Leave the statement to ``config.json``, and change it there."""

    def apply(folder: Path) -> None:
        (folder / "hf_quant_config.json").unlink()
        edit("config.json", lambda content: content["quantization_config"].update(fields))(folder)

    return apply


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    def apply(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors")

    return apply


def unstated(folder: Path) -> None:
    (folder / "hf_quant_config.json").unlink()
    edit("config.json", lambda content: content.pop("quantization_config"))(folder)


def layers(folder: Path, size: int | None = 32) -> dict[str, dict[str, Any]]:
    modules = [module for module in linear_shapes(Checkpoint(folder).config) if module != HEAD]
    return {module: {"quant_algo": "W4A16_AWQ", "group_size": size} for module in modules}


@pytest.mark.parametrize(
    "change",
    [
        both(),
        section(),
        section(group_size=32),
        section(config_groups=GROUPS),
        section(kv_cache_scheme=None, has_zero_point=False),
        stated(quant_algo="W4A16"),
        stated(group_size=None),
        stated(exclude_modules=["encoder.embed*", "*head"]),
        lambda folder: stated(quant_algo="MIXED_PRECISION", quantized_layers=layers(folder), exclude_modules=[])(
            folder
        ),
        lambda folder: section(quant_algo="MIXED_PRECISION", quantized_layers=layers(folder, None), ignore=[])(folder),
    ],
    ids=range(10),
)
def test_equivalent_statements_give_the_same_checkpoint(int4: Path, copy: Path, change: Change) -> None:
    change(copy)
    expected, found = Checkpoint(int4), Checkpoint(copy)
    assert found.quantization is not None
    assert found.quantization.group_size == 32
    for module in linear_shapes(expected.config):
        assert found.is_int4(module) == (module != HEAD)
        assert np.array_equal(found.linear(module).to_float32(), expected.linear(module).to_float32())


def test_matrices_of_several_types(random_checkpoint: Path, copy: Path) -> None:
    """Each matrix has its own type, wherever it is in the network."""
    plain = load_file(random_checkpoint / "model.safetensors")

    def restore(content: dict[str, np.ndarray]) -> None:
        del content[f"{Q}.weight_scale"]
        content[f"{Q}.weight"] = plain[f"{Q}.weight"]

    tensors(restore)(copy)
    stated(exclude_modules=[HEAD, "encoder.embed_tokens", Q])(copy)
    found = Checkpoint(copy)
    assert {module for module in linear_shapes(found.config) if not found.is_int4(module)} == {Q, HEAD}
    assert np.array_equal(found.linear(Q).to_float32(), Checkpoint(random_checkpoint).linear(Q).to_float32())
    assert isinstance(found.linear(UP), Int4Weight)


def test_a_statement_that_nothing_is_quantised(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": null}}')
    assert Checkpoint(folder).quantization is None


FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
REFUSED: dict[str, tuple[Change, str]] = {
    "FP8 KV cache": (
        stated(kv_cache_quant_algo="FP8"),
        r"hf_quant_config\.json: .*KV cache is quantised \(kv_cache_quant_algo FP8\).*; export the checkpoint again",
    ),
    "FP8 KV cache in the config": (section(kv_cache_scheme=FP8), r"config\.json: .*kv_cache_quant_algo FP8"),
    "FP8 KV cache alone": (stated(quant_algo=None, kv_cache_quant_algo="NVFP4"), "kv_cache_quant_algo NVFP4"),
    "no statement": (
        unstated,
        r"is quantised \(encoder\S* is \w+\), but has neither hf_quant_config\.json nor quantization_config in config",
    ),
    "scales of a KV cache, unstated": (
        lambda folder: both(
            unstated,
            tensors(lambda content: [content.pop(name) for name in list(content) if "_proj" in name]),
            tensors(lambda content: content.update({"encoder.layers.0.self_attn.k_proj.k_scale": np.ones(1)})),
        )(folder),
        r"is quantised \(encoder\.layers\.0\.self_attn\.k_proj\.k_scale is F64\)",
    ),
    "another algorithm": (stated(quant_algo="NVFP4"), "quantization.quant_algo: .*'NVFP4'.*ModelOpt's int4 weights"),
    "another algorithm in the config": (section(quant_algo="FP8"), r"quantization_config\.quant_algo: .*'FP8'"),
    "another method": (section(quant_method="gptq", bits=4), "quant_method 'gptq' is not supported"),
    "a zero point": (stated(has_zero_point=True), "has_zero_point"),
    "several algorithms": (
        lambda folder: stated(
            quant_algo="MIXED_PRECISION", quantized_layers=layers(folder) | {Q: {"quant_algo": "FP8"}}
        )(folder),
        r"several methods in one checkpoint are not supported: .*FP8 in groups of None \(encoder",
    ),
    "mixed, unstated": (stated(quant_algo="MIXED_PRECISION"), "quantized_layers does not state"),
    "an excluded matrix that is int4": (
        stated(exclude_modules=[HEAD, Q]),
        r"has, unlike its config.*q_proj\.weight_scale",
    ),
    "a statement that is a list": (
        edit("hf_quant_config.json", lambda content: content.update(quantization=[])),
        "object",
    ),
    "a section that is a list": (
        both(section(), edit("config.json", lambda content: content.update(quantization_config=[]))),
        "quantization_config must be an object",
    ),
    "another group size": (stated(group_size=64), "weight_scale has shape"),
    "no multiple of the group": (stated(group_size=48), "multiples of 48"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(copy: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(copy)
    with pytest.raises(TriModeError, match=message) as caught:
        Checkpoint(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
