"""A checkpoint's config: every published form is read, another network is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.random_checkpoint import config_fields
from trimode.common.errors import TriModeError
from trimode.model.config import ModelConfig

ROPE = config_fields()["rope_parameters"]


def read(folder: Path, fields: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    return ModelConfig.of_folder(folder)


PUBLISHED = {
    "3B": {"hidden_size": 3072, "num_hidden_layers": 26, "intermediate_size": 9216},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 34, "intermediate_size": 14336},
    "14B": {"hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 16384},
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_shapes(tmp_path: Path, size: str) -> None:
    shape = PUBLISHED[size] | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    # Fields of the published file for training and loading. Inference does not use them.
    training = {
        "ar_loss_weight": 1.0,
        "attention_dropout": 0.0,
        "attn_implementation": "sdpa",
        "auto_map": {"AutoModel": "x.Y"},
        "dlm_loss_weight": None,
        "dlm_paradigm": "bidirectional",
        "dp_varying_mask_ratio": False,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "transformers_version": "5.0.0",
        "use_cache": False,
    }
    config = read(tmp_path, config_fields(**shape, vocab_size=131072, max_position_embeddings=262144) | training)
    assert (config.query_width, config.kv_width) == (4096, 1024)
    assert config.hidden_size == PUBLISHED[size]["hidden_size"]


def test_older_rope_fields(tmp_path: Path) -> None:
    """transformers 4 had ``rope_scaling`` and ``rope_theta`` side by side."""
    fields = config_fields(rope_theta=10000.0)
    scaling = fields.pop("rope_parameters")
    scaling["type"] = scaling.pop("rope_type")
    del scaling["rope_theta"]
    found = read(tmp_path, fields | {"rope_scaling": scaling})
    assert found.model_dump() == read(tmp_path, config_fields()).model_dump()


def test_as_many_kv_heads_as_query_heads_where_they_are_null(tmp_path: Path) -> None:
    config = read(tmp_path, config_fields(num_key_value_heads=None, head_dim=None))
    assert (config.num_key_value_heads, config.head_dim) == (4, 32)


END_TOKENS: dict[str, tuple[dict[str, Any], str | None, tuple[int, ...]]] = {
    "one": ({"eos_token_id": 11}, None, (11,)),
    "several": ({"eos_token_id": [11, 2]}, None, (11, 2)),
    "generation config decides": ({"eos_token_id": 2}, '{"eos_token_id": 11}', (11,)),
    "generation config has several": ({"eos_token_id": 2}, '{"eos_token_id": [2, 11], "temperature": 0.1}', (2, 11)),
    "generation config alone": ({"eos_token_id": None}, '{"eos_token_id": 11}', (11,)),
    "generation config has none": ({"eos_token_id": 2}, '{"max_new_tokens": 9}', (2,)),
    "generation config has null": ({"eos_token_id": 2}, '{"eos_token_id": null}', (2,)),
    "byte order mark": ({"eos_token_id": 2}, '\ufeff{"eos_token_id": 11}', (11,)),
}


@pytest.mark.parametrize("case", END_TOKENS)
def test_end_tokens(tmp_path: Path, case: str) -> None:
    """Those at which transformers' ``generate`` ends a text."""
    fields, generation, expected = END_TOKENS[case]
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(generation)
    config = read(tmp_path, config_fields(**fields))
    assert config.eos_token_id == expected
    assert config.model_dump()["eos_token_id"] == expected


@pytest.mark.parametrize(
    ("generation", "named"),
    [
        ('{"eos_token_id": [11, 768]}', "eos_token_id 768 is outside vocab_size 768"),
        ('{"eos_token_id": 100}', "mask_token_id 100 is also eos_token_id"),
        ('{"eos_token_id": "11"}', "eos_token_id"),
        ('{"eos_token_id": []}', "eos_token_id"),
        ("{", "is not valid JSON"),
        ("[]", "file"),
    ],
)
def test_a_generation_config_is_refused_by_name(tmp_path: Path, generation: str, named: str) -> None:
    (tmp_path / "generation_config.json").write_text(generation)
    with pytest.raises(TriModeError, match=rf"generation_config\.json.*{named}") as caught:
        read(tmp_path, config_fields())
    assert "\n" not in str(caught.value)


def test_a_config_without_bos(tmp_path: Path) -> None:
    fields = config_fields()
    del fields["bos_token_id"]
    assert read(tmp_path, fields).bos_token_id is None


@pytest.mark.parametrize(
    "neutral",
    [
        {"layer_types": ["full_attention"] * 2},
        {"rope_theta": 10000},
        {"partial_rotary_factor": 1},
        {"use_qk_norm": False},
        {"final_logit_softcapping": None},
        {"dlm_paradigm": "block_diff"},
        {"rope_scaling": None},
        {"rope_scaling": ROPE},
        {"rope_scaling": {name: value for name, value in ROPE.items() if name != "rope_theta"}},
        {"rope_scaling": {"type": "yarn"} | {name: value for name, value in ROPE.items() if name != "rope_type"}},
        {"rope_scaling": ROPE, "rope_parameters": None},
        {"rope_parameters": ROPE | {"factor": 16, "rope_theta": 10000}},
        {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
        {"rope_parameters": ROPE | {"partial_rotary_factor": 1, "type": "yarn", "max_position_embeddings": 8192}},
        {"rope_parameters": ROPE | {"finetuned": True}},
        {"head_dim": None},
    ],
)
def test_other_spellings_of_the_same_network_give_the_same_record(tmp_path: Path, neutral: dict[str, Any]) -> None:
    plain = read(tmp_path, config_fields()).model_dump() | {"layer_types": None}
    assert read(tmp_path, config_fields(**neutral)).model_dump() | {"layer_types": None} == plain


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "llama"}, "model_type.*; give a checkpoint of the Nemotron-Labs-Diffusion family"),
    "another architecture": ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    "no drafts": ({"dlm_paradigm": "autoregressive"}, "dlm_paradigm"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "tied head": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "sliding window": ({"sliding_window": 4096}, "sliding_window"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    "odd head": ({"head_dim": 31}, "head_dim 31"),
    "mask outside the vocabulary": ({"mask_token_id": 768}, "mask_token_id 768"),
    "mask that ends": ({"mask_token_id": 11}, "mask_token_id 11 is also eos_token_id"),
    "mask that begins": ({"mask_token_id": 1}, "mask_token_id 1 is also bos_token_id"),
    "no end token": ({"eos_token_id": []}, "eos_token_id"),
    "head width that does not divide": ({"head_dim": None, "num_attention_heads": 3}, "head_dim is null"),
    "another rope_scaling": ({"rope_scaling": ROPE | {"factor": 8.0}}, "rope_scaling.factor 8.0 and .*16.0 contradict"),
    "rope_scaling says less": ({"rope_scaling": {"type": "yarn", "factor": 16.0}}, "rope_scaling.original_max_pos"),
    "another type of scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*rope_type"),
    "no rope": ({"rope_parameters": None}, "rope_parameters"),
    "no end tokens at all": ({"eos_token_id": None}, "eos_token_id"),
    "other layers": ({"layer_types": ["sliding_attention"] * 2}, "layer_types.0"),
    "types of more layers": ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, num_hidden_layers 2"),
    "another theta beside": ({"rope_theta": 500000.0}, "rope_theta 500000.0 and rope_parameters.rope_theta 10000.0"),
    "half of each head turned": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "norms of queries and keys": ({"use_qk_norm": True}, "use_qk_norm"),
    "capped logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "capped attention": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "truth for a token": ({"eos_token_id": True}, "eos_token_id"),
    "text for a number": ({"hidden_size": "128"}, r"hidden_size.*\(got '128'\)"),
    "fraction for a count": ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
    "zero layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "original length beyond the maximum": ({"max_position_embeddings": 256}, "original_max_position_embeddings 512"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, named = REFUSED[case]
    with pytest.raises(TriModeError, match=named) as caught:
        read(tmp_path, config_fields(**changes))
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_type": "linear"}, "rope_parameters.rope_type"),
        ({"factor": 0.5}, "rope_parameters.factor"),
        ({"beta_fast": 1.0}, "beta_fast"),
        ({"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor"),
        ({"short_factor": [1.0]}, "rope_parameters.short_factor"),
        ({"rope_theta": float("nan")}, "rope_parameters.rope_theta"),
        ({"original_max_position_embeddings": "512"}, "rope_parameters.original_max_position_embeddings"),
        ({"max_position_embeddings": 4096}, "max_position_embeddings 8192 and .*4096 contradict each other"),
    ],
)
def test_rope_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    fields = config_fields()
    fields["rope_parameters"] = fields["rope_parameters"] | change
    with pytest.raises(TriModeError, match=named):
        read(tmp_path, fields)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_not_a_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(TriModeError, match=r"config\.json"):
        ModelConfig.of_folder(tmp_path)
