"""Reference of the product's kernel."""

from __future__ import annotations

from torch import Tensor


def dense_product(
    x: Tensor,
    weight: Tensor,
    row_scale: Tensor | None = None,
    narrow: Tensor | None = None,
    adapter_up: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y [.., N] from x [.., K] and weight [K, N].

    row_scale: [B], for x of [B, S, K]. narrow: [.., R]. adapter_up: [R, N]. residual: [.., N].
    """
    y = x.float() @ weight.float()
    if row_scale is not None:
        y = y * row_scale.float()[:, None, None]
    if narrow is not None and adapter_up is not None:
        y = y + narrow.float() @ adapter_up.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)
