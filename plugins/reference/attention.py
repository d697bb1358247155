"""Reference of the attention kernels: masked softmax attention over the KV pool, and the merge of splits."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    step: int, write_indices: Tensor, capacity: int, step_lengths: Tensor | None, block_mask: Tensor | None
) -> Tensor:
    """The KV rows that each token of the step attends to: [B, S, C] bool. Arguments as :func:`attend`'s."""
    device = write_indices.device
    other = torch.arange(capacity, device=device)[None, None, :] - write_indices[:, None, None]
    token = torch.arange(step, device=device)[None, :, None]
    if step_lengths is not None:
        return (other < step_lengths[:, None, None]).expand(-1, step, -1)
    if block_mask is None:
        return other <= token
    named = block_mask.gather(2, other.clamp(0, step - 1).expand(-1, step, -1))
    return (other < 0) | ((other < step) & named)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    write_indices: Tensor,
    step_lengths: Tensor | None = None,
    block_mask: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> Tensor:
    """softmax(q k) v output_scale over the visible rows: [B, S, HQ D], 0 where no row is visible. Reference of both
    kernels.

    q: [B, HQ, S, D], rotated and scaled. k_cache, v_cache: [B, HKV, C, D]. write_indices, step_lengths: [B].
    block_mask: [B, S, S] bool. output_scale: [HQ D].
    """
    _, heads, step, _ = q.shape
    group = heads // k_cache.shape[1]
    seen = visible(step, write_indices, k_cache.shape[2], step_lengths, block_mask)[:, None]
    keys, values = (cache.float().repeat_interleave(group, 1) for cache in (k_cache, v_cache))
    logits = (q.float() @ keys.transpose(2, 3)).masked_fill(~seen, float("-inf"))
    # Rows that no token attends to may hold any value, including NaN.
    values = values.masked_fill(~seen.any(2)[..., None], 0)
    attended = logits.softmax(-1).nan_to_num(0) @ values
    return _scaled(attended, output_scale).to(q.dtype)


def _scaled(attended: Tensor, output_scale: Tensor | None) -> Tensor:
    """[B, HQ, S, D] as [B, S, HQ D], times the scale."""
    by_token = attended.transpose(1, 2).flatten(2)
    return by_token if output_scale is None else by_token * output_scale


def merge(partial: Tensor, log_sum_exp: Tensor, output_scale: Tensor | None = None) -> Tensor:
    """Reference of the merge: partial [B, P, HQ, S, D] and log_sum_exp [B, P, HQ, S] give [B, S, HQ D].

    output_scale: [HQ D].
    """
    best = log_sum_exp.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (log_sum_exp - best).exp()
    parts = partial.float().masked_fill((weights == 0)[..., None], 0)
    merged = (parts * weights[..., None]).sum(1) / weights.sum(1).clamp(min=1e-30)[..., None]
    return _scaled(merged, output_scale).to(partial.dtype)
