"""The rotary frequencies against transformers' own module, to the bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.ministral3.modeling_ministral3 import Ministral3Config, Ministral3RotaryEmbedding

from tests.support.random_checkpoint import config_fields
from trimode.model.config import ModelConfig
from trimode.model.rope import yarn_frequencies


@settings(deadline=None, max_examples=200)
@given(
    head_dim=st.sampled_from([16, 32, 64, 80, 96, 128, 256]),
    theta=st.one_of(st.sampled_from([1e4, 5e5, 1e6, 1e9]), st.floats(1e4, 1e9)),
    original=st.sampled_from([16, 128, 4096, 16384]),
    factor=st.one_of(st.sampled_from([1.0, 4.0, 16.0]), st.floats(1, 40)),
    betas=st.sampled_from([(32.0, 1.0), (16.0, 2.0), (64.0, 0.5)]),
    truncate=st.booleans(),
    magnitudes=st.sampled_from([{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.707, "mscale_all_dim": 1.0}]),
    attention_factor=st.sampled_from([None, 0.9]),
)
def test_same_frequencies_as_transformers(
    head_dim: int,
    theta: float,
    original: int,
    factor: float,
    betas: tuple[float, float],
    truncate: bool,
    magnitudes: dict[str, float],
    attention_factor: float | None,
) -> None:
    fields = config_fields(head_dim=head_dim, max_position_embeddings=262144)
    fields["rope_parameters"] = magnitudes | {
        "rope_type": "yarn",
        "rope_theta": theta,
        "original_max_position_embeddings": original,
        "factor": factor,
        "beta_fast": betas[0],
        "beta_slow": betas[1],
        "truncate": truncate,
    }
    if attention_factor is not None:
        fields["rope_parameters"]["attention_factor"] = attention_factor
    found, found_factor = yarn_frequencies(ModelConfig.model_validate(fields))
    expected = Ministral3RotaryEmbedding(Ministral3Config(**fields | {"model_type": "ministral3"}))
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.inv_freq.numpy())
    assert found_factor == expected.attention_scaling
