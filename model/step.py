"""The step contract: the inputs and outputs of both engines, on every target.

A step is S tokens for each of B sequences. It writes their KV rows to the KV pool, from row ``write_indices`` on: the
number of committed rows.

| input | shape | meaning |
|---|---|---|
| ``input_ids``, ``position_ids`` | [B, S] | tokens of this step and their absolute positions |
| ``write_indices`` | [B] | first KV row that this step writes |
| ``block_mask`` (AR) | [B, S, S] bool | tokens of this step that each token attends to |
| ``step_lengths`` (diffusion) | [B] | real tokens of the step; they attend to each other |
| ``logit_rows`` | [B, R] | rows of the step that need logits |
| ``token_mask`` (optional) | [B, R, ceil(V / 32)] uint32 | legal tokens of these rows |
| ``asked_ids`` (optional) | [B, R, M] | tokens whose logits these rows return as well |
| ``top_k`` (target cpu) | [1] | k: candidates to return for each of these rows |
| ``adapter_scale`` (diffusion) | [B] | 1: with the draft adapter; 0: without |
| ``adapter_down.i`` (diffusion) | [query width, rank] | the draft adapter's A, transposed; see below |
| ``adapter_up.i`` (diffusion) | [rank, hidden] | the draft adapter's B, transposed and scaled |
| ``k_cache.i``, ``v_cache.i`` | [B, KV heads, C, D] | the KV pool: C rows of D; the outputs ``*_out.i`` alias them |
| ``k_view.i``, ``v_view.i`` (rtx, view) | [B, KV heads, C, D] | the same memory, bound again for attention to read |
| ``counters`` (tensorrt, cuda) | [N] int32 | zeros before and after every pass; ``counters_out`` aliases it |
| ``total.i`` (several ranks) | [B, S, hidden] | the sum over all ranks of the output ``partial.i`` |
| ``window_rows`` (rtx, window) | [W] | 0 .. W - 1: attend to the first W rows of the pool |

``adapter_down.i``: on tensorrt and cuda, attention multiplies its output by AWQ's input scale of ``o_proj``, which the
adapter reads too. There, A's columns are divided by that scale.

``block_mask``: a lower triangle is causal; a tree's ancestors verify a tree; a row of padding attends to itself.
:mod:`trimode.model.attention` defines which KV rows a token attends to, and the result.

``token_mask``: token i is legal if bit i % 32 of word i // 32 is set. Without it, every token is legal. The mask token
is never legal. Illegal tokens have probability 0.

Graphs have no optional inputs, so their forms of these two depend on the target. On cpu, rtx and tensorrt, masks are
bytes, [B, 0 or R, 4 ceil(V / 32)] uint8, of the same memory, and M may be 0. There is no mask if it has 0 rows. On rtx
and tensorrt the results of masked rows are outputs of their own, ``masked_top_logits``, ``masked_top_tokens`` and
``masked_log_sum_exp``: they are empty without a mask, so an ordinary pass runs no kernel for them. On cuda, launches
depend on whether a pass has them.

Outputs: ``top_logits`` and ``top_tokens`` [B, R, k], the k best legal tokens, best first; of equal ones the lowest id
comes first. Behind the last legal token, and in rows without one, logits are -1e30. ``log_sum_exp`` [B, R] is over all
legal tokens, and -1e30 in a row without one. ``asked_logits`` [B, R, M] are the logits of ``asked_ids``, legal or not.
Rows below ``write_indices`` never change. Row i predicts position i + 1 in the AR engine, and position i in the
diffusion engine.
"""

from __future__ import annotations

from typing import Literal

AttentionPattern = Literal["causal", "bidirectional"]
# Of a tensor; ``real`` is the type of the activations.
ElementType = Literal["real", "fp32", "int64", "int32", "bool", "int8"]
ENGINES: tuple[tuple[str, AttentionPattern], ...] = (("ar", "causal"), ("diffusion", "bidirectional"))


def mask_words(vocab_size: int) -> int:
    """Words of a row of ``token_mask``."""
    return -(-vocab_size // 32)


# An input of the graphs with kernels of our own that every pass shares.
COUNTERS = "counters"


# An input of the graphs with kernels of our own that are divided among ranks: where the ranks exchange partial sums.
RANKS = "ranks"


def cache_inputs(layers: int) -> list[str]:
    """k of layer 0, v of layer 0, k of layer 1, ..."""
    return [f"{part}_cache.{index}" for index in range(layers) for part in ("k", "v")]


def cache_outputs(layers: int) -> list[str]:
    return [name.replace("_cache.", "_cache_out.") for name in cache_inputs(layers)]


def cache_views(layers: int) -> list[str]:
    """In the order of :func:`cache_inputs`."""
    return [name.replace("_cache.", "_view.") for name in cache_inputs(layers)]


def partial_sum(index: int) -> str:
    """Of a graph of several ranks (:mod:`trimode.model.shards`): the output of its sum ``index``, of o_proj in layer
    ``index / 2`` if it is even, else of down_proj.
    """
    return f"partial.{index}"


def total_sum(index: int) -> str:
    """The input that is the sum of :func:`partial_sum` over all ranks."""
    return f"total.{index}"


def adapter_inputs(layer: int) -> tuple[str, str]:
    return f"adapter_down.{layer}", f"adapter_up.{layer}"
