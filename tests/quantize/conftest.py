"""A random tiny checkpoint in the family's format, and what quantisation makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

from trimode.model.checkpoint import ADAPTER_FOLDER, Checkpoint
from trimode.model.reference import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel
from trimode.quantize import quantize_checkpoint

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Matrices this small are slower on more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16, two layers, an adapter that matters, and a few input channels of ``o_proj`` far larger than the others."""
    folder = tmp_path_factory.mktemp("random_checkpoint")
    torch.manual_seed(0)
    model = NemotronLabsDiffusionModel(
        NemotronLabsDiffusionConfig(
            vocab_size=320,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            rope_parameters=ROPE,
            block_size=8,
            mask_token_id=300,
            eos_token_id=301,
            bos_token_id=302,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.06)
            else:
                parameter.uniform_(0.5, 1.5)
        # Mostly the embedding speaks, so that the logits of a random network stand quantisation as a trained one's do.
        model.encoder.embed_tokens.weight *= 4
        for layer in model.encoder.layers:
            layer.self_attn.v_proj.weight *= torch.randn(64, 1).mul(1.5).exp()
    model.bfloat16().save_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=["o_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.06)
    adapted.save_pretrained(folder / ADAPTER_FOLDER)

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"{2 * n}, surely."}]})
        for n in range(4, 8)
    ]
    (folder / "calibration.jsonl").write_text("\n".join([*lines, json.dumps({"text": "Plain text, of one length or another."})]))
    return folder


@pytest.fixture(scope="session")
def source(random_checkpoint: Path) -> Checkpoint:
    return Checkpoint(random_checkpoint)


@pytest.fixture(scope="session")
def rounded(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Round to nearest, the head left alone."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    quantize_checkpoint(source, out, method="rtn")
    return Checkpoint(out)


@pytest.fixture(scope="session")
def awq(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """AWQ, the head left alone."""
    out = tmp_path_factory.mktemp("awq") / "out"
    quantize_checkpoint(source, out, method="awq")
    return Checkpoint(out)


@pytest.fixture(scope="session")
def awq_with_head(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """AWQ in groups of 64, the head int4 too."""
    out = tmp_path_factory.mktemp("awq_with_head") / "out"
    quantize_checkpoint(source, out, method="awq", group=64, head="int4")
    return Checkpoint(out)
