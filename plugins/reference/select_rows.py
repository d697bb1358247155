"""What the operator ``SelectRows`` computes."""

from __future__ import annotations

from torch import Tensor


def select_rows(x: Tensor, logit_rows: Tensor) -> Tensor:
    """[B, L, W] from x [B, S, W] and logit_rows [B, L]."""
    return x.gather(1, logit_rows[..., None].expand(-1, -1, x.shape[2]))
