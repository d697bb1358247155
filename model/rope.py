"""The rotary frequencies of a network, for the graphs of every target.

They are transformers' own numbers, to the bit, computed when an engine is built. One unit in the last place of a
frequency turns into 0.01 rad at position 200,000, and numpy's float32 power differs from PyTorch's in that place.

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
