"""The rotary frequencies of a network, for the graphs of every target.

They are computed when an engine is built, and equal transformers' to the bit. At position 200,000, an error of one unit
in the last place of a frequency is an error of 0.01 rad. numpy's float32 power has such errors, compared with PyTorch.

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
