"""The exported checkpoint is a Ministral-3 of transformers: names, shapes, config and logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, Ministral3Config, Ministral3ForCausalLM

from tests.support.random_checkpoint import write_random_checkpoint
from trimode.common.errors import TriModeError
from trimode.engine.files import hash_file
from trimode.model import int4
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.quantize import export_trtllm, quantize_checkpoint

ORIGINAL = 512  # the random checkpoint's original_max_position_embeddings


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """The exported tensors as fp32 matrices, decoded from the format's definition and not by TriMode's reader."""
    tensors = load_file(folder / "model.safetensors")
    matrices = {}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        if f"{module}.weight_scale" in tensors:
            array = int4.dequantize(int4.unpack(array), tensors[f"{module}.weight_scale"].astype(np.float32))
            if f"{module}.pre_quant_scale" in tensors:
                array = array * tensors[f"{module}.pre_quant_scale"].astype(np.float32)
        matrices[name] = torch.from_numpy(array.astype(np.float32))
    return matrices


def ministral(folder: Path) -> Ministral3ForCausalLM:
    """The model of the exported config and tensors only, without the source checkpoint."""
    fields = json.loads((folder / "config.json").read_text())
    for name in ("architectures", "model_type", "torch_dtype", "quantization_config"):
        fields.pop(name, None)
    # Without query scaling, as TensorRT-LLM would run it.
    rope = fields.pop("rope_scaling") | {"rope_theta": fields.pop("rope_theta"), "llama_4_scaling_beta": 0.0}
    with torch.device("meta"):
        model = Ministral3ForCausalLM(Ministral3Config(rope_parameters=rope, **fields))
    model.load_state_dict(unpacked(folder), strict=True, assign=True)
    # Made on meta with the rest.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


@pytest.fixture(scope="module", params=["16bit", "rounded", "awq"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    checkpoint = request.getfixturevalue({"16bit": "source"}.get(request.param, request.param))
    out = tmp_path_factory.mktemp("trtllm") / "out"
    export_trtllm(checkpoint, out)
    return checkpoint, out


@torch.no_grad()
def test_ministral_3_on_the_export_gives_the_references_causal_logits(exported: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = exported
    ids = torch.randint(101, 768, (2, ORIGINAL), generator=torch.Generator().manual_seed(0))
    expected = load_reference(checkpoint, adapter=False)(ids).logits
    torch.testing.assert_close(ministral(folder)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_config_is_read_by_transformers_as_a_mistral_with_the_same_rope(exported: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = exported
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.architectures) == ("mistral", ["MistralForCausalLM"])
    assert config.max_position_embeddings == ORIGINAL
    assert config.sliding_window is None
    rope = checkpoint.config.rope_parameters.model_dump(exclude_none=True, exclude={"llama_4_scaling_beta", "truncate"})
    assert rope.items() <= config.rope_parameters.items()
    assert (
        AutoTokenizer.from_pretrained(folder)("Hi").input_ids
        == AutoTokenizer.from_pretrained(checkpoint.folder)("Hi").input_ids
    )


def test_int4_tensors_are_in_modelopts_unified_format_with_the_new_names(exported: tuple[Checkpoint, Path]) -> None:
    checkpoint, folder = exported
    tensors = load_file(folder / "model.safetensors")
    if checkpoint.quantization is None:
        assert not (folder / "hf_quant_config.json").exists()
        assert all(name.endswith(".weight") for name in tensors)
        return
    written = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert (written["quant_algo"], written["group_size"]) == ("W4A16_AWQ", checkpoint.quantization.group_size)
    assert written["exclude_modules"] == ["lm_head", "model.embed_tokens"]
    inline = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert inline["ignore"] == written["exclude_modules"]
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    assert (up.dtype, up.shape) == (np.uint8, (192, 128))
    assert tensors["model.layers.1.mlp.up_proj.weight_scale"].shape == (384, 1)
    assert tensors["lm_head.weight"].dtype.itemsize == 2


def test_only_the_ar_network_is_written(exported: tuple[Checkpoint, Path]) -> None:
    _, folder = exported
    assert not (folder / "linear_spec_lora").exists()
    assert not (folder / "quantization_report.json").exists()
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_exports_of_one_checkpoint_are_identical(source: Checkpoint, tmp_path: Path) -> None:
    hashes = []
    for name in ("first", "second"):
        export_trtllm(source, tmp_path / name)
        hashes.append({path.name: hash_file(path) for path in (tmp_path / name).iterdir()})
    assert hashes[0] == hashes[1]


def changed_rope(folder: Path, random: Path, **changes: Any) -> Checkpoint:
    shutil.copytree(random, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def test_without_query_scaling_the_full_context_length_is_kept(random_checkpoint: Path, tmp_path: Path) -> None:
    plain = changed_rope(tmp_path / "plain", random_checkpoint, llama_4_scaling_beta=0.0)
    assert export_trtllm(plain, tmp_path / "out").max_tokens == 8192


@pytest.mark.parametrize(
    ("changes", "words"), [({"attention_factor": 1.2}, "attention_factor is 1.2"), ({"truncate": False}, "truncate")]
)
def test_a_rope_that_tensorrt_llm_cannot_express_is_refused(
    random_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(TriModeError, match=words):
        export_trtllm(changed_rope(tmp_path / "odd", random_checkpoint, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_int4_head_is_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    quantize_checkpoint(Checkpoint(random_checkpoint), tmp_path / "int4", method="rtn", head="int4")
    with pytest.raises(TriModeError, match="quantise with --head 16bit"):
        export_trtllm(Checkpoint(tmp_path / "int4"), tmp_path / "out")


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_random_checkpoint(tmp_path / "source"))

    def interrupt(_stage: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_trtllm(checkpoint, tmp_path / "out", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
