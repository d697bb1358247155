"""YaRN in numpy against transformers' own, over shapes and parameters of the family and beyond."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.support.random_checkpoint import config_fields
from trimode.model.config import ModelConfig
from trimode.model.reference.network import NemotronLabsDiffusionConfig
from trimode.model.rope import yarn_frequencies


@settings(deadline=None, max_examples=60)
@given(
    head_dim=st.sampled_from([32, 64, 128]),
    theta=st.sampled_from([1e4, 1e6, 1e9]),
    original=st.sampled_from([16, 128, 16384]),
    factor=st.sampled_from([1.0, 4.0, 16.0]),
    truncate=st.booleans(),
    magnitudes=st.sampled_from([(1.0, 1.0), (None, None), (0.707, 1.0)]),
)
def test_same_frequencies_as_transformers(
    head_dim: int,
    theta: float,
    original: int,
    factor: float,
    truncate: bool,
    magnitudes: tuple[float | None, float | None],
) -> None:
    fields = config_fields(head_dim=head_dim, max_position_embeddings=262144)
    fields["rope_parameters"] = fields["rope_parameters"] | {
        "rope_theta": theta,
        "original_max_position_embeddings": original,
        "factor": factor,
        "truncate": truncate,
        "mscale": magnitudes[0],
        "mscale_all_dim": magnitudes[1],
    }
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](NemotronLabsDiffusionConfig(**fields))
    found, found_factor = yarn_frequencies(ModelConfig.model_validate(fields))
    assert np.allclose(found, expected.numpy(), rtol=1e-6, atol=0)
    assert found_factor == pytest.approx(expected_factor, rel=1e-12)
