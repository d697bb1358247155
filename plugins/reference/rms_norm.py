"""Reference of the normalisation's kernel."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    """x [.., H] over its root mean square in fp32, rounded to the type of ``x``, times weight [H]. epsilon: [1]."""
    wide = x.float()
    unit = wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return unit.to(x.dtype) * weight
