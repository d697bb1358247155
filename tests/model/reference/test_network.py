"""The reference's interface: upstream's signatures, and transformers' interface of causal language models."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationMixin, PreTrainedModel, pipeline

from trimode.model.checkpoint import Checkpoint
from trimode.model.reference import network
from trimode.model.reference.decoding import TriModeGeneration
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionForCausalLM, NemotronLabsDiffusionModel
from trimode.model.reference.patterns import bidirectional, causal

POSITIONAL = {
    "generate": [
        "prompt_ids",
        "max_new_tokens",
        "block_length",
        "threshold",
        "causal_context",
        "temperature",
        "eos_token_id",
        "max_thinking_tokens",
        "end_think_token_id",
    ],
    "ar_generate": [
        "prompt_ids",
        "max_new_tokens",
        "temperature",
        "eos_token_id",
        "max_thinking_tokens",
        "end_think_token_id",
    ],
    "linear_spec_generate": [
        "prompt_ids",
        "max_new_tokens",
        "block_length",
        "temperature",
        "mask_token_id",
        "eos_token_id",
        "max_thinking_tokens",
        "end_think_token_id",
        "threshold",
    ],
    "forward": ["input_ids", "attention_mask", "position_ids"],
}


@pytest.fixture(scope="module")
def reference(random_checkpoint: Path) -> NemotronLabsDiffusionModel:
    return load_reference(Checkpoint(random_checkpoint), adapter=False)


@pytest.fixture(scope="module")
def causal_lm(random_checkpoint: Path) -> NemotronLabsDiffusionForCausalLM:
    return AutoModelForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(101, 768, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", POSITIONAL)
def test_positional_arguments_are_upstreams(method: str) -> None:
    parameters = inspect.signature(getattr(NemotronLabsDiffusionModel, method)).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["self", *POSITIONAL[method]]


def test_transformers_classes_and_the_mixin_share_no_other_name() -> None:
    """If the mixin defined a name that transformers uses, ``generate`` would break."""
    theirs = set(dir(GenerationMixin)) | set(dir(PreTrainedModel))
    assert {name for name in vars(TriModeGeneration) if not name.startswith("__")} & theirs == {"generate"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_masks": torch.ones(2, 24)}, "no argument attention_masks"),
        ({"inputs_embeds": torch.ones(2, 24, 128)}, "no argument inputs_embeds"),
        ({"labels": torch.ones(2, 24)}, "leave labels out"),
        ({"ce_loss_weight": 0.5}, "leave ce_loss_weight out"),
        ({"return_dict": False}, "leave return_dict out"),
        ({"visible": causal(2, 24, 0), "attention_mask": torch.ones(2, 24)}, "either visible or attention_mask"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_forward_refuses_what_it_does_not_do(
    reference: NemotronLabsDiffusionModel, ids: torch.Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        reference(ids, **arguments)


def test_forward_takes_the_defaults_of_upstreams_training_arguments(
    reference: NemotronLabsDiffusionModel, ids: torch.Tensor
) -> None:
    found = reference(ids, None, None, labels=None, eps=1e-3, is_teacher=False, skip_loss=False)
    assert found.logits.equal(reference(ids).logits)


@torch.no_grad()
def test_forwards_patterns_and_hidden_states_are_the_encoders(
    reference: NemotronLabsDiffusionModel, ids: torch.Tensor
) -> None:
    positions = torch.arange(24).expand(2, -1)
    for use_causal_mask, pattern in ((True, causal), (False, bidirectional)):
        hidden, _ = reference.encoder(ids, positions, pattern(2, 24, 0))
        assert reference(ids, use_causal_mask=use_causal_mask).logits.equal(reference.diffusion_head(hidden))
        found = reference(ids, use_causal_mask=use_causal_mask, output_last_hidden_states_only=True)
        assert found.last_hidden_state.equal(hidden)
    last = reference(ids, logits_to_keep=3).logits
    torch.testing.assert_close(last, reference(ids).logits[:, -3:])


@torch.no_grad()
def test_forward_reads_a_cache_always_and_appends_to_it_with_use_cache(
    reference: NemotronLabsDiffusionModel, ids: torch.Tensor
) -> None:
    whole = reference(ids).logits
    cache = reference(ids[:, :10], use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    torch.testing.assert_close(reference(ids[:, 10:], past_key_values=cache).logits, whole[:, 10:])
    assert cache.get_seq_length() == 10
    torch.testing.assert_close(reference(ids[:, 10:], past_key_values=cache, use_cache=True).logits, whole[:, 10:])
    assert cache.get_seq_length() == 24


@torch.no_grad()
@pytest.mark.parametrize("use_causal_mask", [True, False])
def test_padding_changes_nothing(
    reference: NemotronLabsDiffusionModel, ids: torch.Tensor, use_causal_mask: bool
) -> None:
    alone = reference(ids[:1, 9:], use_causal_mask=use_causal_mask).logits
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = reference(ids, mask, positions, use_causal_mask=use_causal_mask).logits
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:1, 9:], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"must be \[batch, 24\]"):
        reference(ids, mask[:, 1:])


def test_embeddings_are_found_and_replaced(random_checkpoint: Path) -> None:
    model = load_reference(Checkpoint(random_checkpoint), adapter=False)
    assert model.get_input_embeddings() is model.encoder.embed_tokens
    assert model.get_output_embeddings() is model.diffusion_head
    embeddings, head = torch.nn.Embedding(768, 128), torch.nn.Linear(128, 768, bias=False)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)
    assert model.encoder.embed_tokens is embeddings
    assert model.diffusion_head is head


def test_another_mask_token_changes_drafts_but_not_the_verified_text(
    reference: NemotronLabsDiffusionModel, ids: torch.Tensor
) -> None:
    expected, _ = reference.ar_generate(ids[:1], 20, eos_token_id=-1)
    for mask, threshold in ((300, 0.0), (300, 0.5), (int(expected[0, 30]), 0.5)):
        found, _ = reference.linear_spec_generate(ids[:1], 20, 8, 0.0, mask, -1, threshold=threshold)
        assert found.equal(expected)


def test_generate_commits_causal_rows_only(reference: NemotronLabsDiffusionModel, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="causal_context is False"):
        reference.generate(ids, 8, 8, 0.9, False)


def test_the_model_cards_pipeline_answers(tiny_checkpoint: Path, heldout: list[dict]) -> None:
    answer = pipeline("text-generation", model=str(tiny_checkpoint))
    messages = heldout[0]["messages"]
    found = answer(messages)[0]["generated_text"][-1]
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt").input_ids
    out, _ = answer.model.ar_generate(prompt, 256)
    expected = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    assert found == {"role": "assistant", "content": expected}


def test_transformers_generate_decodes_a_padded_batch_as_ar_does(
    causal_lm: NemotronLabsDiffusionForCausalLM, ids: torch.Tensor
) -> None:
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    found = causal_lm.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for row, start in ((0, 9), (1, 0)):
        expected, _ = causal_lm.ar_generate(ids[row : row + 1, start:], 12, eos_token_id=-1)
        assert found[row, start:].equal(expected[0])


def test_transformers_generate_never_draws_the_mask_token(
    causal_lm: NemotronLabsDiffusionForCausalLM, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = int(causal_lm(ids[:1]).logits[0, -1].argmax())
    monkeypatch.setattr(causal_lm.config, "mask_token_id", best)
    found = causal_lm.generate(ids[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert best not in found[0, 24:].tolist()


def test_frequencies_are_computed_once(
    reference: NemotronLabsDiffusionModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a CUDA graph can capture a later pass: transformers computes them from tensors of the CPU."""
    with torch.inference_mode():
        first = reference(ids).logits
        monkeypatch.delitem(network.ROPE_INIT_FUNCTIONS, "yarn")
        assert torch.equal(reference(ids).logits, first)
