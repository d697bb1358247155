"""The kernels as functions of tensors, executed by the interpreter. They take the same arguments as the references.

Outputs are filled with NaN before a launch, and inputs are compared with a copy after it. Under ``pytest tests/plugins
--gpu``, a GPU executes the kernels (:mod:`tests.support.gpu_kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scripts.gpu.kernel_checks import distance
from scripts.gpu.kernel_launch import KernelLaunch, node_of, prepare
from trimode.plugins.operators import Attend, Int4Product, KvWrite, MergeSplits, Operator, Tactic
from trimode.plugins.reference import (
    candidates,
    dense_product,
    embed,
    head_product,
    rms_norm,
    rotations,
    select_rows,
    swiglu,
)
from trimode.plugins.reference.norm_terms import norm_terms

if TYPE_CHECKING:
    from tests.support.triton_interpreter import Traffic

# Largest relative error of a kernel. bf16 has three bits fewer than fp16, and the interpreter rounds it towards zero.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def reference_of(name: str, real: torch.dtype) -> Callable[..., Any]:
    """The reference of an operator that has no function of its own below."""
    if name == "Rotations":
        return partial(rotations.rotations, real=real)
    if name.startswith("DenseProduct"):
        return dense_product.dense_product
    if name.startswith("Int4Head"):
        return head_product.int4_head
    if name.startswith("DenseHead"):
        return head_product.dense_head
    return {
        "Embed": embed.embed,
        "EmbedForNorm": embed.embed_for_norm,
        "SelectRows": select_rows.select_rows,
        "RmsNorm": rms_norm.rms_norm,
        "SwiGlu": swiglu.swiglu,
        "MergeCandidates": candidates.merge_candidates,
    }[name]


def interpreted(launched: KernelLaunch) -> dict[str, Traffic]:
    """Execute one launch in the interpreter. Returns the traffic of its tensors."""
    # Imported here: what the interpreter needs of Triton depends on its version, which a GPU's machine chooses.
    from tests.support.triton_interpreter import interpret
    from trimode.plugins.compilation import kernel_of

    kernel, arguments = kernel_of(launched.operator), launched.arguments
    absent = {name: None for name in kernel.arg_names if name not in arguments and name not in launched.constants}
    return interpret(kernel, launched.grid, {**arguments, **absent}, launched.constants)


class Executed:
    """How launches are executed. by: returns the traffic of the tensors by name, empty if it is not counted."""

    by: Callable[[KernelLaunch], dict[str, Traffic]] = staticmethod(interpreted)


def launch(launched: KernelLaunch) -> dict[str, Traffic]:
    """Execute one launch. Its inputs must not change, except those that an output aliases."""
    operator, arguments = launched.operator, launched.arguments
    aliased = {output.aliases for output in operator.outputs}
    inputs = {operand.name: arguments[operand.name] for operand in operator.inputs if operand.name not in aliased}
    copies = {name: tensor.clone() for name, tensor in inputs.items() if isinstance(tensor, Tensor)}
    traffic = Executed.by(launched)
    for name, before in copies.items():
        torch.testing.assert_close(inputs[name], before, rtol=0, atol=0, equal_nan=True, msg=f"{name} was changed")
    return traffic


def run(
    operator: Operator,
    inputs: Mapping[str, Tensor],
    *,
    tactic: Tactic | None = None,
    real: torch.dtype = torch.float32,
    **attributes: int,
) -> tuple[tuple[Tensor, ...], dict[str, Traffic]]:
    """The outputs of one operator, and its traffic. tactic: the first one if None. real: as for ``prepare``."""
    ordered = {operand.name: inputs[operand.name] for operand in operator.inputs}
    tactic = tactic or operator.tactics(node_of(ordered, attributes))[1]
    launched = prepare(operator, ordered, tactic, attributes, real)
    return launched.outputs, launch(launched)


def kv_write(**inputs: Tensor) -> tuple[Tensor, dict[str, Traffic]]:
    """As the reference, and the kernel's traffic."""
    launched = prepare(KvWrite(), inputs, KvWrite.TACTICS[0])
    traffic = launch(launched)
    return launched.outputs[0], traffic


def attend(
    *,
    splits: int = 4,
    tactic: Tactic = Attend.TACTICS[0],
    output_scale: Tensor | None = None,
    **inputs: Tensor,
) -> tuple[Tensor, dict[str, Traffic], dict[str, Traffic]]:
    """As the reference, and both kernels' traffic."""
    operator = Attend("bidirectional" if "step_lengths" in inputs else "masked" if "block_mask" in inputs else "causal")
    over_splits = prepare(operator, inputs, tactic, {"splits": splits})
    attend_traffic = launch(over_splits)
    partial, log_sum_exp = over_splits.outputs
    assert not log_sum_exp.isnan().any()
    written = ~partial.isnan().any(-1)
    assert torch.equal(written, log_sum_exp != -torch.inf), "a split is written if and only if it attended to a row"
    scale = {} if output_scale is None else {"output_scale": output_scale}
    merged = prepare(
        MergeSplits(output_scale=output_scale is not None),
        {"partial": partial, "log_sum_exp": log_sum_exp, **scale},
        MergeSplits.TACTICS[0],
        {"splits": splits, "group": inputs["q"].shape[1] // inputs["k_cache"].shape[1]},
    )
    merge_traffic = launch(merged)
    return merged.outputs[0], attend_traffic, merge_traffic


def int4_product(*, tactic: Tactic, gated: bool = False, **inputs: Tensor) -> tuple[Tensor, dict[str, Traffic]]:
    """As the reference, and the kernel's traffic. counters: of an operator whose parts are separate programs."""
    operator = Int4Product(
        split="counters" in inputs,
        adapter="narrow" in inputs,
        residual="residual" in inputs,
        normed="squares" in inputs,
        gated=gated,
        for_norm="next_weight" in inputs,
    )
    launched = prepare(operator, {operand.name: inputs[operand.name] for operand in operator.inputs}, tactic)
    traffic = launch(launched)
    if operator.for_norm:
        y, *terms = launched.outputs[:3]
        for found, expected in zip(terms, norm_terms(y, inputs["next_weight"]), strict=True):
            assert distance(found, expected) < 4 * TOLERANCES[torch.float32] + (found.dtype != torch.float32) * 1e-2
    return launched.outputs[0], traffic
