"""The rotary frequencies of a network and the scales of its queries, for the graphs of every target.

Frequencies are computed when an engine is built, and equal transformers' to the bit. At position 200,000, an error of
one unit in the last place of a frequency is an error of 0.01 rad. numpy's float32 power has such errors, compared with
PyTorch.

Source: YaRN, arXiv 2309.00071, section 3.2 (NTK-by-parts).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimode.model.config import ModelConfig
from trimode.model.reference.network import NemotronLabsDiffusionConfig


def yarn_frequencies(config: ModelConfig) -> tuple[NDArray[np.float32], float]:
    """(radians per position of each pair of a head, [head_dim / 2]; the factor by which cos and sin are multiplied)."""
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](NemotronLabsDiffusionConfig.of(config))
    return frequencies.numpy(), float(attention_factor)


def query_scales(config: ModelConfig) -> NDArray[np.float64]:
    """The factor of a query at position p is entry p // original context of this table.

    It is 1 + beta * log(1 + p // original context), times the softmax scale. As an attribute of the attention node,
    compilers would apply the root of the softmax scale to every key of the pool.
    """
    rope = config.rope_parameters
    steps = np.arange(-(-config.max_position_embeddings // rope.original_max_position_embeddings))
    scales: NDArray[np.float64] = (1 + rope.llama_4_scaling_beta * np.log1p(steps)) * config.head_dim**-0.5
    return scales
