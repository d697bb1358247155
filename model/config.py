"""The family's ``config.json`` as a checked record.

Every size is read from the file. A value of a network that TriMode does not support is refused with its field's name.
Fields for training are ignored: there are many, and they differ between releases.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from trimode.common.errors import TriModeError
from trimode.common.records import describe, read_json, read_json_record

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_REMEDY = "give a checkpoint of the Nemotron-Labs-Diffusion family"
TokenId = Annotated[int, Field(ge=0)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int) else value


EndIds = Annotated[tuple[TokenId, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
# For fields that have one valid value, or repeat another field. They are checked and left out of the manifest.
_neutral = partial(Field, default=None, exclude=True)
_WholeFactor = Annotated[float, Field(ge=1, le=1)]


class RopeParameters(BaseModel):
    """YaRN (arXiv 2309.00071) with Llama-4 query scaling. Both are active at every position, not only at long ones."""

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
    # Some exports repeat these here.
    type: Literal["yarn"] | None = _neutral()
    max_position_embeddings: PositiveInt | None = _neutral()
    partial_rotary_factor: _WholeFactor | None = _neutral()
    finetuned: bool | None = _neutral()

    @model_validator(mode="before")
    @classmethod
    def _named_type(cls, fields: Any) -> Any:
        """Older configs have ``type`` in place of ``rope_type``."""
        if isinstance(fields, dict) and "rope_type" not in fields and "type" in fields:
            return fields | {"rope_type": fields["type"]}
        return fields

    @model_validator(mode="after")
    def _betas_in_order(self) -> RopeParameters:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must exceed beta_slow {self.beta_slow}")
        return self


class ModelConfig(BaseModel):
    """Sizes and special tokens of the network. Widths are in elements, lengths in tokens."""

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
    eos_token_id: EndIds
    bos_token_id: TokenId | None = None
    block_size: PositiveInt = 32
    # Any other value describes another network.
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    sliding_window: None = None
    layer_types: Annotated[tuple[Literal["full_attention"], ...] | None, BeforeValidator(_as_tuple)] = None
    # The same holds for these, which not every config has.
    architectures: Annotated[tuple[Literal["NemotronLabsDiffusionModel"]] | None, BeforeValidator(_as_tuple)] = (
        _neutral()
    )
    dlm_paradigm: Literal["bidirectional", "block_diff", "sbd_block_diff"] | None = _neutral()
    rope_theta: float | None = _neutral()
    rope_scaling: RopeParameters | None = _neutral()
    partial_rotary_factor: _WholeFactor | None = _neutral()
    use_qk_norm: Literal[False] | None = _neutral()
    attn_logit_softcapping: None = _neutral()
    final_logit_softcapping: None = _neutral()

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, fields: Any) -> Any:
        """Derive the head counts that are null, and give older configs' rope fields their present place."""
        if not isinstance(fields, dict):
            return fields
        fields = dict(fields)
        heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
        if fields.get("num_key_value_heads", heads) is None:
            fields["num_key_value_heads"] = heads
        if fields.get("head_dim", heads) is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            if hidden % heads:
                raise ValueError(f"head_dim is null, and hidden_size {hidden} is not a multiple of {heads} heads")
            fields["head_dim"] = hidden // heads
        scaling, parameters = fields.get("rope_scaling"), fields.get("rope_parameters")
        if isinstance(scaling, dict):
            if "rope_theta" not in scaling:
                theta = parameters.get("rope_theta") if isinstance(parameters, dict) else fields.get("rope_theta")
                fields["rope_scaling"] = scaling = scaling | ({} if theta is None else {"rope_theta": theta})
            if parameters is None:
                fields["rope_parameters"] = scaling
        return fields

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if self.mask_token_id >= self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} is outside vocab_size {self.vocab_size}")
        self._require_text_tokens("eos_token_id", self.eos_token_id)
        self._require_text_tokens("bos_token_id", () if self.bos_token_id is None else (self.bos_token_id,))
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, num_hidden_layers {self.num_hidden_layers}"
            )
        rope = self.rope_parameters
        if self.rope_scaling is not None:
            scaling, present = self.rope_scaling.model_dump(), rope.model_dump()
            for name in scaling:
                if scaling[name] != present[name]:
                    raise ValueError(
                        f"rope_scaling.{name} {scaling[name]} and rope_parameters.{name} {present[name]} contradict "
                        "each other"
                    )
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

    def _require_text_tokens(self, name: str, tokens: tuple[int, ...]) -> None:
        """Raises ValueError if one is outside the vocabulary or the mask."""
        for token in tokens:
            if token >= self.vocab_size:
                raise ValueError(f"{name} {token} is outside vocab_size {self.vocab_size}")
            if token == self.mask_token_id:
                raise ValueError(f"mask_token_id {token} is also {name}")

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def of_folder(cls, folder: Path) -> ModelConfig:
        """Read a checkpoint's ``config.json``, with the end tokens of its ``generation_config.json`` if that has any.

        Those are the tokens at which transformers' ``generate`` ends a text. Raises TriModeError that names the file,
        the field and the value.
        """
        path, generation_path = folder / CONFIG, folder / GENERATION_CONFIG
        generation = _GenerationConfig()
        if generation_path.is_file():
            generation = read_json_record(_GenerationConfig, generation_path)
        end_ids = generation.eos_token_id
        try:
            fields = read_json(path)
            if end_ids is not None and isinstance(fields, dict) and fields.get("eos_token_id") is None:
                fields["eos_token_id"] = list(end_ids)
            config = cls.model_validate(fields)
        except ValidationError as error:
            raise TriModeError(f"{path}: {describe(error)}; {_REMEDY}") from None
        except TriModeError as error:
            raise TriModeError(f"{error}; {_REMEDY}") from None
        if end_ids is None:
            return config
        try:
            config._require_text_tokens("eos_token_id", end_ids)
        except ValueError as error:
            raise TriModeError(f"{generation_path}: {error}") from None
        return config.model_copy(update={"eos_token_id": end_ids})


class _GenerationConfig(BaseModel):
    """The field of ``generation_config.json`` that TriMode reads."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    eos_token_id: EndIds | None = None
