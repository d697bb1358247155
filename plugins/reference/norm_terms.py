"""What an operator writes for the norm after it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trimode.plugins.operators.norm_terms import NORM_COLUMNS


def norm_terms(x: Tensor, next_weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., N] times the norm's weight [N], and the sums of x^2 over tiles of columns [tiles, M]."""
    squares = F.pad(x.float().square().flatten(0, -2), (0, -x.shape[-1] % NORM_COLUMNS))
    sums = squares.reshape(len(squares), -1, NORM_COLUMNS).sum(-1).T.contiguous()
    return (x.float() * next_weight.float()).to(x.dtype), sums
