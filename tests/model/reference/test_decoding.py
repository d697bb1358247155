"""The reference against transformers' Ministral-3, and its decoding modes against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoTokenizer, Ministral3Config, Ministral3ForCausalLM

from tests.support.random_checkpoint import config_fields
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.decoding import PassTotals
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel


@pytest.fixture(scope="module")
def reference(random_checkpoint: Path) -> NemotronLabsDiffusionModel:
    return load_reference(Checkpoint(random_checkpoint))


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(101, 768, (2, 30), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_causal_logits_are_those_of_ministral_3(random_checkpoint: Path) -> None:
    """At positions before and after a step of the query scaling; YaRN acts on all of them."""
    reference = load_reference(Checkpoint(random_checkpoint), adapter=False)
    fields = {name: value for name, value in config_fields().items() if name not in ("model_type", "architectures")}
    ministral = Ministral3ForCausalLM(Ministral3Config(**fields)).eval()
    renamed = {
        name.replace("encoder.", "model.").replace("diffusion_head", "lm_head"): tensor
        for name, tensor in reference.state_dict().items()
    }
    ministral.load_state_dict(renamed)
    ids = torch.randint(101, 768, (1, 1200), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(reference(ids).logits, ministral(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_model_cards_snippets_run_without_remote_code(random_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_checkpoint)
    model = AutoModel.from_pretrained(random_checkpoint, dtype=torch.bfloat16)
    assert isinstance(model, NemotronLabsDiffusionModel)
    assert AutoConfig.from_pretrained(random_checkpoint).mask_token_id == 100
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    end = tokenizer.eos_token_id
    for out, nfe in (
        model.ar_generate(ids, max_new_tokens=6),
        model.generate(ids, max_new_tokens=6, block_length=32, threshold=0.9, eos_token_id=end),
        model.linear_spec_generate(ids, max_new_tokens=6, block_length=32, eos_token_id=end),
    ):
        assert out[0, : ids.shape[1]].equal(ids[0])
        assert nfe >= 1
    base = PeftModel.from_pretrained(model, random_checkpoint, subfolder="linear_spec_lora").eval().model
    out, _ = base.linear_spec_generate(ids, max_new_tokens=6, block_length=32, eos_token_id=end)
    assert out.shape[1] <= ids.shape[1] + 6


@pytest.mark.parametrize("block_length", [1, 2, 8, 32])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_linear_spec_emits_what_ar_emits(
    reference: NemotronLabsDiffusionModel, prompt: torch.Tensor, block_length: int, threshold: float
) -> None:
    expected, passes = reference.ar_generate(prompt, 40)
    assert passes <= 80
    found, _ = reference.linear_spec_generate(prompt, 40, block_length=block_length, threshold=threshold)
    assert found.equal(expected)


def test_the_adapter_is_on_in_drafts_only(reference: NemotronLabsDiffusionModel, prompt: torch.Tensor) -> None:
    """Recorded in its layer, for every kind of pass."""
    layer = reference.encoder.layers[0].self_attn.o_proj
    seen: list[bool] = []
    hook = layer.register_forward_hook(lambda module, *_: seen.append(not module.disable_adapters))
    try:
        reference.ar_generate(prompt[:1], 4)
        reference.generate(prompt[:1], 4, block_length=4, threshold=0.9)
        assert seen
        assert not any(seen)
        seen.clear()
        reference.linear_spec_generate(prompt[:1], 5, block_length=4)
        assert seen[:3] == [False, True, False]
    finally:
        hook.remove()


def test_diffusion_with_a_block_of_one_is_ar(reference: NemotronLabsDiffusionModel, prompt: torch.Tensor) -> None:
    assert reference.generate(prompt, 20, block_length=1)[0].equal(reference.ar_generate(prompt, 20)[0])


@pytest.mark.parametrize(("steps", "passes"), [(7, 7), (3, 3), (1, 1)])
def test_without_a_threshold_denoise_passes_are_the_quota(
    reference: NemotronLabsDiffusionModel, prompt: torch.Tensor, steps: int, passes: int
) -> None:
    # 1 token from the prefill, 7 from the masks of a block of 8, 1 from its commit.
    out, nfe = reference.generate(prompt[:1], 9, block_length=8, steps=steps, eos_token_id=-1)
    assert out.shape[1] == 30 + 9
    assert reference.passes == PassTotals(prefill=1, denoise=passes, commit=1)
    assert nfe == passes + 1


@pytest.mark.parametrize("block_length", [8, 16, 32])
@pytest.mark.parametrize("threshold", [0.5, 0.9, None])
def test_diffusions_first_tokens_do_not_depend_on_the_length_limit(
    reference: NemotronLabsDiffusionModel, prompt: torch.Tensor, block_length: int, threshold: float | None
) -> None:
    longest, _ = reference.generate(prompt[:1], 96, block_length, threshold, eos_token_id=-1)
    for length in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 50):
        out, _ = reference.generate(prompt[:1], length, block_length, threshold, eos_token_id=-1)
        assert out.equal(longest[:, : 30 + length])


def test_the_last_block_of_diffusion_ends_with_the_context(
    reference: NemotronLabsDiffusionModel, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    encoder = reference.encoder.forward
    monkeypatch.setattr(
        reference.encoder, "forward", lambda ids, *rest: (lengths.append(ids.shape[1]), encoder(ids, *rest))[1]
    )
    monkeypatch.setattr(reference.config, "max_position_embeddings", 45)
    reference.generate(prompt[:1], 12, 8, 0.0, eos_token_id=-1)
    # The prompt of 30 tokens, a block of 8 that is denoised and committed, and the remaining 7 rows of the context.
    assert lengths == [30, 8, 8, 7]


def test_the_thinking_budget_forces_its_token_and_the_text_goes_on_from_it(
    reference: NemotronLabsDiffusionModel, prompt: torch.Tensor
) -> None:
    kwargs = {"max_thinking_tokens": 5, "end_think_token_id": 13, "eos_token_id": -1}
    expected, _ = reference.ar_generate(prompt[:1], 20, **kwargs)
    assert expected[0, 35] == 13
    # The continuation is AR's after a prompt with the same ending: text and cache agree.
    after, _ = reference.ar_generate(expected[:, :36], 14, eos_token_id=-1)
    assert after.equal(expected)
    assert reference.linear_spec_generate(prompt[:1], 20, block_length=8, **kwargs)[0].equal(expected)


def test_diffusion_denoises_around_the_end_of_thinking(
    reference: NemotronLabsDiffusionModel, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[list[int]] = []
    bidirectional_logits = reference._bidirectional_logits
    monkeypatch.setattr(
        reference,
        "_bidirectional_logits",
        lambda block, *rest, **options: (
            blocks.append(block.tolist()),
            bidirectional_logits(block, *rest, **options),
        )[1],
    )
    limit = {"end_think_token_id": 13, "eos_token_id": -1}
    for budget, place in ((5, 5), (7, 7), (8, None), (0, None)):
        blocks.clear()
        out, _ = reference.generate(prompt[:1], 20, 8, 0.9, max_thinking_tokens=budget, **limit)
        assert out[0, 30 + budget] == 13
        first = [100] * 7
        if place is not None:
            first[place - 1] = 13
        assert blocks[0][1:] == first
        assert all(place is None or block[place] == 13 for block in blocks if block[0] == blocks[0][0])


@pytest.mark.parametrize("mode", ["ar_generate", "generate", "linear_spec_generate"])
def test_no_mode_exceeds_max_new_tokens_or_emits_a_mask(
    reference: NemotronLabsDiffusionModel, prompt: torch.Tensor, mode: str
) -> None:
    out, _ = getattr(reference, mode)(prompt, 11, eos_token_id=-1)
    assert out.shape == (2, 41)
    assert not (out == 100).any()


def test_sampled_linear_spec_has_ars_distribution() -> None:
    """The distribution of the first three tokens on a vocabulary of 12, against AR's exact probabilities."""
    torch.manual_seed(0)
    fields = config_fields(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8
    )
    fields |= {"num_hidden_layers": 1, "mask_token_id": 3, "eos_token_id": 11}
    model = NemotronLabsDiffusionModel(NemotronLabsDiffusionModel.config_class(**fields)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.tensor([[1, 5, 7]])

    @torch.no_grad()
    def law(prefix: torch.Tensor) -> torch.Tensor:
        logits = model(prefix).logits[0, -1]
        logits[3] = -torch.inf
        return (logits / 0.8).softmax(-1)

    draws = 4000
    counts = torch.zeros(12, 12, 12)
    for _ in range(draws):
        out, _ = model.linear_spec_generate(ids, 3, block_length=3, temperature=0.8, eos_token_id=-1)
        counts[tuple(out[0, 3:].tolist())] += 1
    exact = torch.zeros(12, 12, 12)
    for first in range(12):
        for second in range(12):
            prefix = torch.tensor([[1, 5, 7, first, second]])
            exact[first, second] = law(ids)[first] * law(prefix[:, :4])[second] * law(prefix)
    distance = 0.5 * (counts / draws - exact).abs().sum()
    # Expected distance of a true sample: half the sum of mean deviations, sqrt(2 p (1 - p) / (pi n)).
    noise = 0.5 * (2 * exact * (1 - exact) / (torch.pi * draws)).sqrt().sum()
    assert distance < 1.3 * noise
