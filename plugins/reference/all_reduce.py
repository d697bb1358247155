"""What the operator ``AllReduce`` computes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def all_reduce(partials: Sequence[Tensor], residual: Tensor) -> Tensor:
    """partials: of all ranks, in order, of the type and shape of ``residual``. Added in fp32, and rounded once."""
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    return (total + residual.float()).to(residual.dtype)
