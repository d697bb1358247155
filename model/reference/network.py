"""The network in PyTorch: what every other executor is measured against.

A Ministral-3 decoder (RMSNorm, grouped-query attention, SwiGLU, YaRN rotary embedding, no biases) whose one head serves
autoregression and diffusion. The mode is nothing but the attention pattern, so ``visible`` is an input and the network
knows no modes. Module names are the checkpoint's tensor names.

Importing this module registers the family with transformers, so ``AutoModel.from_pretrained(folder)`` needs no remote
code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.ministral3 import Ministral3Config

from trimode.model.reference.decoding import TriModeGeneration
from trimode.model.reference.patterns import KeyValue, causal


class NemotronLabsDiffusionConfig(Ministral3Config):
    """Ministral-3's fields and the family's own; see the model card's ``config.json``."""

    model_type = "nemotron_labs_diffusion"

    mask_token_id: int = 100
    block_size: int = 32
    dlm_paradigm: str = "bidirectional"
    eos_token_id: int | list[int] | None = 11
    pad_token_id: int | None = None


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
    """Token ids to final hidden states (upstream calls the decoder stack 'encoder', and so do the tensor names)."""

    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, visible: Tensor, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run one step.

        input_ids, position_ids: [batch, step]. visible: [batch, step, past + step] bool, the keys each query sees.
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
        """cos and sin of YaRN's angles (transformers' own frequencies), [batch, 1, step, head_dim]."""
        frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](self.config, position_ids.device)
        angles = position_ids[:, None, :, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * attention_factor, angles.sin() * attention_factor

    def _query_scale(self, position_ids: Tensor) -> Tensor:
        """Llama-4 temperature tuning, 1 + beta * log(1 + floor(position / original length)); [batch, 1, step, 1]."""
        rope = self.config.rope_parameters
        steps = torch.floor(position_ids[:, None, :, None] / rope["original_max_position_embeddings"])
        beta: float = rope.get("llama_4_scaling_beta", 0.0)
        return 1 + beta * torch.log(1 + steps)


class NemotronLabsDiffusionModel(TriModeGeneration, PreTrainedModel):
    config_class = NemotronLabsDiffusionConfig
    config: NemotronLabsDiffusionConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, visible: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Logits of a whole sequence: causal from position 0 unless told otherwise. Shapes as in :class:`Encoder`."""
        batch, step = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(step, device=input_ids.device).expand(batch, step)
        if visible is None:
            visible = causal(batch, step, 0, input_ids.device)
        hidden, _present = self.encoder(input_ids, position_ids, visible)
        return CausalLMOutput(logits=self.diffusion_head(hidden))


AutoConfig.register(NemotronLabsDiffusionConfig.model_type, NemotronLabsDiffusionConfig)
AutoModel.register(NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel)
