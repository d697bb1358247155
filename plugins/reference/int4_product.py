"""Reference of the int4 product's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from trimode.plugins.operators.int4_product import PAIRED


def dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """W [K, N] in fp32, from words [tiles, units, columns, words] and scales [K / group, N]: nibble j of word w is
    n + 8 of the unit's row ``words * j + w``.
    """
    nibbles = torch.stack([packed >> 4 * j & 15 for j in range(8)], dim=-1)
    columns = scale.shape[1]
    integers = nibbles.permute(1, 4, 3, 0, 2).flatten(3).flatten(0, 2)[:, :columns] - 8
    return integers * scale.float().repeat_interleave(integers.shape[0] // scale.shape[0], 0)


def halves(y: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second columns of y's pairs, each [.., N / 2]."""
    first, second = y.reshape(*y.shape[:-1], -1, 2, PAIRED).unbind(-2)
    return first.flatten(-2), second.flatten(-2)


def int4_product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    narrow: Tensor | None = None,
    adapter_up: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    squares: Tensor | None = None,
    epsilon: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """y [M, N] from x [M, K]. narrow: [M, R]. adapter_up: [R, N]. residual: [M, N].

    squares: [T, M], and epsilon: [1], of the norm whose weighted input x is. gated: y [M, N / 2] is the gated
    activation of the pairs of columns.
    """
    y = x.float() @ dequantize(packed, scale)
    if squares is not None and epsilon is not None:
        y = y / (squares.sum(0).reshape(*x.shape[:-1], 1) / x.shape[-1] + epsilon).sqrt()
    if narrow is not None and adapter_up is not None:
        y = y + narrow.float() @ adapter_up.float()
    if residual is not None:
        y = y + residual.float()
    if gated:
        gate, up = halves(y)
        y = gate * gate.sigmoid() * up
    return y.to(x.dtype)
