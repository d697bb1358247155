"""Reference of the rotations' kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def rotations(
    position_ids: Tensor,
    frequencies: Tensor,
    key_scale: Tensor,
    query_scales: Tensor,
    *,
    length: int,
    real: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The queries' cos and sin, then the keys', each [B, S, D / 2] of type ``real``.

    position_ids: [B, S]. frequencies: [D / 2]. key_scale: [1]. query_scales: [T], one for each ``length`` positions.
    """
    angles = (position_ids.float()[..., None] * frequencies).double()
    cos, sin = angles.cos().float(), angles.sin().float()
    scale = query_scales[(position_ids // length).clamp(max=len(query_scales) - 1)][..., None]
    found = (cos * scale, sin * scale, cos * key_scale, sin * key_scale)
    query_cos, query_sin, key_cos, key_sin = (table.to(real) for table in found)
    return query_cos, query_sin, key_cos, key_sin
