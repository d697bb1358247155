"""YaRN's rotary frequencies in numpy, for executors that have no torch.

Source: YaRN, arXiv 2309.00071, section 3.2 (NTK-by-parts); the same numbers as transformers' ``yarn``, which the
reference uses.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trimode.model.config import ModelConfig


def yarn_frequencies(config: ModelConfig) -> tuple[NDArray[np.float32], float]:
    """(angle per position of each pair of a head [head_dim / 2], the factor that cos and sin carry).
    Pairs that turn more than ``beta_fast`` times within the original length keep their frequency; those that turn less
    than ``beta_slow`` times are slowed by ``factor``; between the two the change is linear in the pair's index.
    """
    rope, dim = config.rope_parameters, config.head_dim
    length = rope.original_max_position_embeddings

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    pair = np.arange(dim // 2, dtype=np.float32)
    slowed = np.clip((pair - np.float32(low)) / np.float32(high - low), 0, 1)
    frequency = 1 / np.float32(rope.rope_theta) ** (2 * pair / dim)
    blended = frequency / np.float32(rope.factor) * slowed + frequency * (1 - slowed)
    return blended.astype(np.float32), _attention_factor(config)


def _attention_factor(config: ModelConfig) -> float:
    rope = config.rope_parameters
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
