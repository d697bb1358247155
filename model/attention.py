"""The definition of attention, in plain loops. Every implementation is checked against it.

A step has S tokens for each sequence. Its first token is stored in row ``committed`` of the sequence's KV rows, token i
in row ``committed`` + i. Query head h attends with KV head h // (query heads / KV heads):

- A token attends to every committed row.
- Causal: token i also attends to the step's rows 0 .. i.
- Bidirectional: every token also attends to the step's first ``step_length`` rows.
- Masked: token i also attends to the rows of the step for which ``block_mask[i]`` is true.
- No token attends to a row after the step. Rows that a token does not attend to may hold any value, including NaN.
- A token that attends to no row gets zeros. Otherwise the result is softmax(q k) v over the rows that it attends to,
  with the softmax's scale already part of q.

Implementations: the network in PyTorch (:mod:`trimode.model.reference`, which calibration uses as well), the kernels'
reference (:mod:`trimode.plugins.reference.attention`, against which the kernels are checked), the plugins' ONNX
functions (:mod:`trimode.build.graph.operator_functions`), and the graph of standard operators
(:mod:`trimode.build.graph.network`).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def attends(
    token: int,
    row: int,
    committed: int,
    step: int,
    step_length: int | None = None,
    block_mask: NDArray[np.bool_] | None = None,
) -> bool:
    """Whether a token of a step attends to a KV row of its sequence.

    step: tokens of the step. step_length: for bidirectional attention. block_mask: [S, S], for masked attention. With
    neither, attention is causal.
    """
    other = row - committed
    if other < 0:
        return True
    if step_length is not None:
        return other < step_length
    if block_mask is not None:
        return other < step and bool(block_mask[token, other])
    return other <= token


def attend(
    q: NDArray[np.floating],
    keys: NDArray[np.floating],
    values: NDArray[np.floating],
    committed: int,
    step_length: int | None = None,
    block_mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """The attention of one sequence's step, [query heads, S, head dim].

    q: [query heads, S, head dim], rotated and scaled. keys, values: [KV heads, rows, head dim], the step's rows
    included. Others as in :func:`attends`.
    """
    heads, step, head_dim = q.shape
    kv_heads, rows, _ = keys.shape
    result = np.zeros((heads, step, head_dim))
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        for token in range(step):
            seen = [row for row in range(rows) if attends(token, row, committed, step, step_length, block_mask)]
            weights = [math.exp(float(q[head, token] @ keys[kv_head, row])) for row in seen]
            for row, weight in zip(seen, weights, strict=True):
                result[head, token] += weight / sum(weights) * values[kv_head, row]
    return result
