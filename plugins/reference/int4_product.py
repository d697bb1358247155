"""Reference of the int4 product's kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """W [K, N] in fp32, from bytes [K, N / 2] whose low nibble is the even column, and scales [K / group, N]."""
    nibbles = torch.stack((packed & 15, (packed >> 4) & 15), dim=-1).flatten(1)
    integers = (nibbles ^ 8) - 8
    return integers * scale.float().repeat_interleave(packed.shape[0] // scale.shape[0], 0)


def int4_product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    input_scale: Tensor | None = None,
    narrow: Tensor | None = None,
    adapter_up: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y [M, N] from x [M, K]. input_scale: [K]. narrow: [M, R]. adapter_up: [R, N]. residual: [M, N]."""
    scaled = x if input_scale is None else (x.float() * input_scale.float()).to(x.dtype)
    y = scaled.float() @ dequantize(packed, scale)
    if narrow is not None and adapter_up is not None:
        y = y + narrow.float() @ adapter_up.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)
