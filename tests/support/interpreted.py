"""The kernels as functions of tensors, run in the interpreter: what an engine does with them on a GPU.

They take what the references take. Outputs are filled with NaN first; what no kernel may touch is held against a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.interpretation import Traffic, interpret
from trimode.plugins import contracts
from trimode.plugins.compilation import kernel_of
from trimode.plugins.contracts import AttentionShape, Operator, ProductShape, Tactic

BARS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2; NaN where an output was not written."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def launch(
    operator: Operator, grid: tuple[int, ...], constants: dict[str, Any], arguments: dict[str, Any]
) -> dict[str, Traffic]:
    """Run an operator; its inputs must come out as they went in, those that an output aliases aside."""
    kernel = kernel_of(operator)
    assert set(arguments) == set(operator.parameters)
    aliased = {output.aliases for output in operator.outputs}
    kept = {tensor.name: arguments[tensor.name].clone() for tensor in operator.inputs if tensor.name not in aliased}
    absent = {name: None for name in kernel.arg_names if name not in arguments and name not in constants}
    traffic = interpret(kernel, grid, {**arguments, **absent}, constants)
    for name, before in kept.items():
        torch.testing.assert_close(arguments[name], before, rtol=0, atol=0, equal_nan=True, msg=f"{name} was changed")
    return traffic


def kv_write(qkv: Tensor, *rest: Tensor) -> tuple[Tensor, dict[str, Traffic]]:
    """As :func:`trimode.plugins.kv_write.kv_write`, and the kernel's traffic."""
    batch, step, width = qkv.shape
    k_cache, v_cache = rest[-2:]
    _, kv_heads, capacity, head_dim = k_cache.shape
    heads = width // head_dim - 2 * kv_heads
    q = poisoned(batch, heads, step, head_dim, dtype=qkv.dtype)
    shape = AttentionShape(kv_heads, heads // kv_heads, head_dim, splits=1)
    arguments = dict(zip(contracts.KV_WRITE.parameters, [qkv, *rest, step, capacity, q, k_cache, v_cache], strict=True))
    traffic = launch(
        contracts.KV_WRITE, contracts.kv_write_grid(batch, step), contracts.kv_write_constants(shape), arguments
    )
    return q, traffic


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    write_indices: Tensor,
    step_lengths: Tensor | None = None,
    block_mask: Tensor | None = None,
    *,
    splits: int = 4,
    tactic: Tactic = contracts.ATTEND_TACTICS[0],
) -> tuple[Tensor, dict[str, Traffic], dict[str, Traffic]]:
    """As :func:`trimode.plugins.attention.attend`, and both kernels' traffic."""
    batch, heads, step, head_dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    shape = AttentionShape(kv_heads, heads // kv_heads, head_dim, splits)
    parts = contracts.split_count(splits, step)
    partial = poisoned(batch, parts, heads, step, head_dim, dtype=q.dtype)
    log_sum_exp = poisoned(batch, parts, heads, step, dtype=torch.float32)
    visibility = {"step_lengths": step_lengths, "block_mask": block_mask}
    operator = contracts.attend(
        "bidirectional" if step_lengths is not None else "masked" if block_mask is not None else "causal"
    )
    attend_traffic = launch(
        operator,
        contracts.attend_grid(shape, tactic, batch, step),
        {**contracts.attend_constants(shape), **tactic.constants},
        {
            "q": q,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "write_indices": write_indices,
            **{name: tensor for name, tensor in visibility.items() if tensor is not None},
            "step": step,
            "capacity": capacity,
            "partial": partial,
            "log_sum_exp": log_sum_exp,
        },
    )
    assert not log_sum_exp.isnan().any()
    assert torch.equal(partial.isnan().any(-1), log_sum_exp == -torch.inf), "a split is written where it saw something"
    attended = poisoned(batch, step, heads * head_dim, dtype=q.dtype)
    merge_traffic = launch(
        contracts.MERGE,
        contracts.merge_grid(shape, batch, step),
        contracts.merge_constants(shape),
        {"partial": partial, "log_sum_exp": log_sum_exp, "step": step, "splits": parts, "attended": attended},
    )
    return attended, attend_traffic, merge_traffic


def int4_product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    input_scale: Tensor | None = None,
    narrow: Tensor | None = None,
    adapter_up: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    tactic: Tactic,
) -> tuple[Tensor, dict[str, Traffic]]:
    """As :func:`trimode.plugins.int4_product.int4_product`, and the kernel's traffic."""
    inner, columns = packed.shape[0], packed.shape[1] * 2
    shape = ProductShape(
        inner=inner,
        columns=columns,
        group=inner // scale.shape[0],
        input_scale=input_scale is not None,
        rank=0 if narrow is None else narrow.shape[1],
        residual=residual is not None,
    )
    y = poisoned(x.shape[0], columns, dtype=x.dtype)
    optional = {"input_scale": input_scale, "narrow": narrow, "adapter_up": adapter_up, "residual": residual}
    traffic = launch(
        contracts.int4_product(shape),
        contracts.int4_product_grid(shape, tactic, x.shape[0]),
        {**contracts.int4_product_constants(shape), **tactic.constants},
        {
            "x": x,
            "packed": packed,
            "scale": scale,
            **{name: tensor for name, tensor in optional.items() if tensor is not None},
            "rows": x.shape[0],
            "y": y,
        },
    )
    return y, traffic
