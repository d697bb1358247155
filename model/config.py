"""The family's ``config.json`` as a checked record.

Sizes are read, never assumed. A value that would change the network into one that TriMode does not compute is refused
by name; fields that only steer training (there are many, and they vary between releases) are left alone.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from trimode.common.errors import TriModeError
from trimode.common.records import read_json_record

TokenId = Annotated[int, Field(ge=0)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int) else value


# Of fields that change nothing or are refused; a manifest does without them.
_neutral = partial(Field, default=None, exclude=True)


class RopeParameters(BaseModel):
    """YaRN (arXiv 2309.00071) with Llama-4 query scaling; active at every position, not only at long ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    rope_type: Literal["yarn"]
    rope_theta: Annotated[float, Field(gt=1)]
    factor: Annotated[float, Field(ge=1)]
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
    attention_factor: PositiveFloat | None = None
    truncate: bool = True
    llama_4_scaling_beta: Annotated[float, Field(ge=0)] = 0.0
    # Repeated here by some exports; they say nothing new.
    type: Literal["yarn"] | None = None
    max_position_embeddings: PositiveInt | None = None

    @model_validator(mode="after")
    def _betas_in_order(self) -> RopeParameters:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must exceed beta_slow {self.beta_slow}")
        return self


class ModelConfig(BaseModel):
    """What the network is. Widths in elements, lengths in tokens."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    model_type: Literal["nemotron_labs_diffusion"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_parameters: RopeParameters
    mask_token_id: TokenId
    eos_token_id: Annotated[tuple[TokenId, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    bos_token_id: TokenId
    block_size: PositiveInt = 32
    # Any other value is another network.
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    sliding_window: None = None
    rope_scaling: None = None
    layer_types: Annotated[tuple[Literal["full_attention"], ...] | None, BeforeValidator(_as_tuple)] = None
    # And so it is with these, which configs of the family or of its kin may have.
    architectures: Annotated[tuple[Literal["NemotronLabsDiffusionModel"]] | None, BeforeValidator(_as_tuple)] = (
        _neutral()
    )
    dlm_paradigm: Literal["bidirectional", "block_diff", "sbd_block_diff"] | None = _neutral()
    rope_theta: float | None = _neutral()
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = _neutral()
    use_qk_norm: Literal[False] | None = _neutral()
    attn_logit_softcapping: None = _neutral()
    final_logit_softcapping: None = _neutral()

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        for name, token in (
            ("mask_token_id", self.mask_token_id),
            ("bos_token_id", self.bos_token_id),
            *(("eos_token_id", token) for token in self.eos_token_id),
        ):
            if token >= self.vocab_size:
                raise ValueError(f"{name} {token} is outside vocab_size {self.vocab_size}")
        for name, tokens in (("eos_token_id", self.eos_token_id), ("bos_token_id", (self.bos_token_id,))):
            if self.mask_token_id in tokens:
                raise ValueError(f"mask_token_id {self.mask_token_id} is also {name}")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, num_hidden_layers {self.num_hidden_layers}"
            )
        rope = self.rope_parameters
        for name in ("rope_theta", "max_position_embeddings"):
            outer, inner = getattr(self, name), getattr(rope, name)
            if None not in (outer, inner) and outer != inner:
                raise ValueError(f"{name} {outer} and rope_parameters.{name} {inner} contradict each other")
        if rope.original_max_position_embeddings > self.max_position_embeddings:
            raise ValueError(
                f"rope_parameters.original_max_position_embeddings {rope.original_max_position_embeddings} exceeds "
                f"max_position_embeddings {self.max_position_embeddings}"
            )
        return self

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read ``config.json``; raises TriModeError that names the file, the field and the value."""
        try:
            return read_json_record(cls, path)
        except TriModeError as error:
            raise TriModeError(f"{error}; give a checkpoint of the Nemotron-Labs-Diffusion family") from None
