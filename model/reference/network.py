"""The network in PyTorch: the oracle that every executor is compared with.

A Ministral-3 decoder (RMSNorm, grouped-query attention, SwiGLU, YaRN rotary embedding, no biases). One head serves
autoregression and diffusion (technical report, arXiv 2607.05722). The modes differ in the attention pattern alone, so
the pattern (``visible``) is an input of the network. Module names are the checkpoint's tensor names.

Importing this module registers the family with transformers: ``AutoModel``, ``AutoModelForCausalLM`` and
``pipeline("text-generation")`` load its checkpoints without remote code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.ministral3 import Ministral3Config

from trimode.model.config import ModelConfig
from trimode.model.reference.decoding import TriModeGeneration
from trimode.model.reference.patterns import KeyValue, bidirectional, causal


class NemotronLabsDiffusionConfig(Ministral3Config):
    """Ministral-3's fields and the family's own; see the model card's ``config.json``."""

    model_type = "nemotron_labs_diffusion"

    mask_token_id: int = 100
    block_size: int = 32
    dlm_paradigm: str = "bidirectional"
    eos_token_id: int | list[int] | None = 11
    pad_token_id: int | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> NemotronLabsDiffusionConfig:
        """The fields that TriMode has read and checked, and the name of the network, which ModelOpt's export reads."""
        return cls(architectures=["NemotronLabsDiffusionModel"], **config.model_dump(mode="json", exclude_none=True))


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        normalised = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normalised.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split (NeoX) form: x [batch, heads, step, dim], cos, sin [batch, 1, step, dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, query_scale: Tensor, visible: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        batch, step, _ = x.shape
        q, k, v = (
            projection(x).view(batch, step, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin) * query_scale, rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        attended = F.scaled_dot_product_attention(
            q, k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1), attn_mask=visible.unsqueeze(1)
        )
        return self.o_proj(attended.transpose(1, 2).reshape(batch, step, -1)), (k, v)


class MLP(nn.Module):
    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Layer(nn.Module):
    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *attention_inputs: Any) -> tuple[Tensor, KeyValue]:
        attended, present = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Encoder(nn.Module):
    """Token ids to final hidden states. Upstream and the tensor names call the decoder stack 'encoder'."""

    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens: nn.Embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._frequencies: dict[torch.device, tuple[Tensor, float]] = {}

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, visible: Tensor, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run one step.

        input_ids, position_ids: [batch, step]. visible: [batch, step, past + step] bool, the keys of each query.
        past: per layer, keys and values [batch, kv_heads, past, head_dim].
        Returns the hidden states [batch, step, hidden] and ``past`` with this step's rows appended.
        """
        cos, sin = self._rotary_table(position_ids)
        query_scale = self._query_scale(position_ids)
        x = self.embed_tokens(input_ids)
        present: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            x, rows = layer(
                x, cos.to(x.dtype), sin.to(x.dtype), query_scale.to(x.dtype), visible, past[index] if past else None
            )
            present.append(rows)
        return self.norm(x), present

    def _rotary_table(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of YaRN's angles (transformers' own frequencies), [batch, 1, step, head_dim].

        The frequencies are computed once for each device: transformers makes them from tensors of the CPU, which a
        CUDA graph cannot capture. They are no buffer of the module, which a change of its type would round.
        """
        device = position_ids.device
        if device not in self._frequencies:
            with torch.inference_mode(False):
                self._frequencies[device] = ROPE_INIT_FUNCTIONS["yarn"](self.config, device)
        frequencies, attention_factor = self._frequencies[device]
        angles = position_ids[:, None, :, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * attention_factor, angles.sin() * attention_factor

    def _query_scale(self, position_ids: Tensor) -> Tensor:
        """Llama-4 temperature tuning, 1 + beta * log(1 + floor(position / original length)); [batch, 1, step, 1]."""
        rope = self.config.rope_parameters
        steps = torch.floor(position_ids[:, None, :, None] / rope["original_max_position_embeddings"])
        beta: float = rope.get("llama_4_scaling_beta", 0.0)
        return 1 + beta * torch.log(1 + steps)


# transformers renamed it in the course of version 5.
_CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# Arguments of upstream's ``forward`` for training, with their defaults.
_TRAINING_DEFAULTS: dict[str, Any] = {
    "labels": None,
    "split_len": None,
    "block_size": None,
    "eps": 1e-3,
    "is_teacher": False,
    "masked_indices": None,
    "p_mask": None,
    "teacher_logits": None,
    "masked_indices_teacher": None,
    "loss_mask": None,
    "ce_loss_weight": 1.0,
    "skip_loss": False,
}


class NemotronLabsDiffusionModel(TriModeGeneration, PreTrainedModel):
    """The network with its head, under upstream's name and with upstream's methods."""

    config_class = NemotronLabsDiffusionConfig
    config: NemotronLabsDiffusionConfig
    encoder: Encoder
    diffusion_head: nn.Linear
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.diffusion_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.diffusion_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
        use_causal_mask: bool = True,
        visible: Tensor | None = None,
        logits_to_keep: int = 0,
        output_last_hidden_states_only: bool = False,
        return_dict: bool = True,
        **training: Any,
    ) -> CausalLMOutputWithPast | BaseModelOutput:
        """One pass with upstream's arguments; logits [batch, step, vocabulary].

        attention_mask: [batch, past + step], 0 for padding. position_ids: [batch, step], by default those after the
        cache. past_key_values: rows of earlier passes; this pass's rows are appended with ``use_cache`` only.
        use_causal_mask: False for bidirectional attention. (Upstream's default depends on the mode that ran last.)
        visible: the pattern of :class:`Encoder`, in place of the masks. logits_to_keep: number of last tokens that need
        logits, 0 for all.

        Raises TypeError for an unknown argument, and for a training argument that differs from its default.
        """
        for name, value in training.items():
            if name not in _TRAINING_DEFAULTS:
                raise TypeError(f"forward() has no argument {name}")
            if value is not _TRAINING_DEFAULTS[name] and value != _TRAINING_DEFAULTS[name]:
                raise TypeError(f"forward() does not train: leave {name} out")
        if not return_dict:
            raise TypeError("forward() returns a ModelOutput: leave return_dict out")
        batch, step = input_ids.shape
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + step, device=input_ids.device).expand(batch, step)
        if visible is None:
            pattern = causal if use_causal_mask else bidirectional
            visible = pattern(batch, step, past, input_ids.device)
            if attention_mask is not None:
                visible = visible & attends(attention_mask, step, past)
        elif attention_mask is not None:
            raise TypeError("forward() takes either visible or attention_mask")
        rows = [(layer.keys, layer.values) for layer in past_key_values.layers] if past_key_values and past else None
        hidden, present = self.encoder(input_ids, position_ids, visible, rows)
        if use_cache:
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
            for index, (keys, values) in enumerate(present):
                past_key_values.update(keys[:, :, past:], values[:, :, past:], index)
        if output_last_hidden_states_only:
            return BaseModelOutput(last_hidden_state=hidden)
        logits = self.diffusion_head(hidden[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{_CACHE_FIELD: past_key_values})


def attends(attention_mask: Tensor, step: int, past: int) -> Tensor:
    """[batch, step, past + step] bool: every token attends to the tokens that are not padding, and to itself.

    attention_mask: [batch, past + step]. Padding attends to itself, because attention to no key gives NaN.
    """
    if attention_mask.shape[1:] != (past + step,):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; it must be [batch, {past + step}], the cached "
            "tokens and those of this pass"
        )
    itself = torch.ones(step, past + step, dtype=torch.bool, device=attention_mask.device).tril(past).triu(past)
    return attention_mask[:, None].bool() | itself


class NemotronLabsDiffusionForCausalLM(NemotronLabsDiffusionModel, GenerationMixin):
    """The network with transformers' interface for causal language models: ``generate`` is transformers' own and
    autoregressive. ``AutoModelForCausalLM`` and ``pipeline("text-generation")`` need it. Upstream has no such class.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast | BaseModelOutput:
        """As :class:`NemotronLabsDiffusionModel`'s. cache: later transformers' name of ``past_key_values``."""
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values=past_key_values if cache is None else cache,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **others,
        )

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """transformers' ``generate``; the mask token is never a candidate."""
        return GenerationMixin.generate(self, *inputs, **{"suppress_tokens": [self.config.mask_token_id]} | options)


AutoConfig.register(NemotronLabsDiffusionConfig.model_type, NemotronLabsDiffusionConfig)
AutoModel.register(NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel)
AutoModelForCausalLM.register(NemotronLabsDiffusionConfig, NemotronLabsDiffusionForCausalLM)
