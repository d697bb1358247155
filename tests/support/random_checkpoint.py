"""A checkpoint in the family's exact format, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from trimode.model.reference.network import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel

CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{{ '<think>\n' if enable_thinking else '<think></think>' }}{% endif %}"""
NAMED_TOKENS = {
    0: "<unk>",
    1: "<s>",
    10: "<|im_start|>",
    11: "<|im_end|>",
    12: "<think>",
    13: "</think>",
    100: "<|mask|>",
}


def config_fields(**changes: Any) -> dict[str, Any]:
    """A small ``config.json``: 4 query heads on 2 KV heads, query scaling that steps every 512 positions."""
    fields: dict[str, Any] = {
        "architectures": ["NemotronLabsDiffusionModel"],
        "model_type": "nemotron_labs_diffusion",
        "vocab_size": 768,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "mask_token_id": 100,
        "eos_token_id": 11,
        "bos_token_id": 1,
        "block_size": 32,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
    }
    return fields | changes


def write_random_checkpoint(folder: Path, seed: int = 0, rank: int = 8, **config: Any) -> Path:
    """Write network, adapter and tokenizer; the same seed and config give the same bytes."""
    torch.manual_seed(seed)
    model = NemotronLabsDiffusionModel(NemotronLabsDiffusionConfig(**config_fields(**config)))
    for name, parameter in model.named_parameters():
        # Large enough that attention is not nearly uniform and logits are not nearly equal.
        mean, spread = (1.0, 0.1) if "norm" in name else (0.0, 1.0 if "embed" in name else 0.12)
        torch.nn.init.normal_(parameter, mean, spread)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config_fields(**config), indent=2))
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=["o_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder / "linear_spec_lora")
    write_random_tokenizer(folder, model.config.vocab_size)
    return folder


def write_random_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer without merges. Every id of the vocabulary is a token."""
    special = {index: NAMED_TOKENS.get(index, f"<SPECIAL_{index}>") for index in range(101)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in special.items()}
    vocabulary |= {character: 101 + index for index, character in enumerate(alphabet)}
    vocabulary |= {f"word{index}": index for index in range(len(vocabulary), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "<|im_end|>",
                "unk_token": "<unk>",
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
