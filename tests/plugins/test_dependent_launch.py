"""Kernels that may start before the previous one has ended: until they wait for it, they touch no memory."""

from __future__ import annotations

import re

import pytest

from trimode.plugins.compilation import compile_operator, kernel_of
from trimode.plugins.operators import OPERATORS

HEADS = {"KV_HEADS": 2, "GROUP": 2, "HEAD_DIM": 64}
PRODUCT = {"INNER": 1024, "COLUMNS": 256, "GROUP": 128, "UNIT": 128, "RANK": 0, "SPLITS": 1, "GATED": 0}
HEAD = {"MASK_TOKEN": 100, "LISTED": 1}
DENSE = {"INNER": 256, "COLUMNS": 256, "RANK": 0, "SPLITS": 1}
# Operators whose kernels together have every input that a kernel can have.
CONSTANTS: dict[str, dict[str, int]] = {
    "KvWrite": HEADS,
    "AttendCausal": HEADS,
    "AttendBidirectional": HEADS,
    "AttendMasked": HEADS,
    "MergeSplitsScaled": {**HEADS, "SPLITS": 16},
    "Int4Product": PRODUCT,
    "Int4ProductNormedGated": {**PRODUCT, "GATED": 1},
    "Int4ProductSplitAdaptedResidualForNorm": {**PRODUCT, "RANK": 64, "SPLITS": 4},
    "QkvProductSplitNormed": {
        **{name: PRODUCT[name] for name in ("INNER", "GROUP", "UNIT")},
        "COLUMNS": 512,
        "SPLITS": 4,
        "HEADS": 4,
        "KV_HEADS": 2,
        "HEAD_DIM": 64,
    },
    "EmbedForNorm": {"WIDTH": 256},
    "Rotations": {"HALF": 32, "SCALES": 16, "LENGTH": 128},
    "RmsNorm": {"WIDTH": 256},
    "SwiGlu": {"WIDTH": 256},
    "DenseProductSplitRowScaled": {**DENSE, "SPLITS": 2},
    "DenseProductAdaptedResidual": {**DENSE, "RANK": 64},
    "SelectRows": {"WIDTH": 256},
    "AllReduceForNorm": {"WIDTH": 256, "RANKS": 2},
    "Int4HeadNormedMasked": {
        **{name: PRODUCT[name] for name in ("INNER", "GROUP", "UNIT")},
        "COLUMNS": 768,
        **HEAD,
    },
    "DenseHeadMasked": {"INNER": 256, "COLUMNS": 768, **HEAD},
    "MergeCandidates": {"TILES": 12, "VOCABULARY": 768, "TOP_K": 4},
}
WAIT, ALLOW = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
# Instructions that read, write or fetch memory, branch or end. No kernel writes the memory of parameters.
_EFFECT = re.compile(r"\b(?:ld|st|atom|red|cp|prefetch|bra|ret|exit|mbarrier)\b[.\w:]*")


def ptx_of(name: str, capability: int) -> str:
    operator = OPERATORS[name]
    return compile_operator(operator, CONSTANTS[name], operator.TACTICS[0], "bf16", capability).ptx  # type: ignore[attr-defined]


def effects_before_the_wait(ptx: str) -> list[str]:
    before, waits, _ = ptx[ptx.index("{") :].partition(WAIT)
    assert waits, "the kernel does not wait"
    return [found for found in _EFFECT.findall(before) if not found.startswith("ld.param")]


def test_every_kernel_is_among_these() -> None:
    assert {kernel_of(OPERATORS[name]) for name in CONSTANTS} == set(map(kernel_of, OPERATORS.values()))


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_kernel_waits_before_it_reads_or_writes_memory(name: str) -> None:
    """Every program waits, since nothing branches or ends before. Later, it allows the next kernel to be placed."""
    ptx = ptx_of(name, 90)
    assert effects_before_the_wait(ptx) == []
    assert ptx.count(WAIT) == ptx.count(ALLOW) == 1
    assert ptx.index(WAIT) < ptx.index(ALLOW)


@pytest.mark.parametrize(
    "name", [name for name in CONSTANTS if re.search("Product|Head|Attend", name) and "Adapted" not in name]
)
def test_a_large_kernel_has_multiplied_its_tiles_when_the_next_one_is_placed(name: str) -> None:
    before, _, after = ptx_of(name, 90).partition(ALLOW)
    assert "mma" in before
    assert "mma" not in after


@pytest.mark.parametrize("name", ["Int4Product", "RmsNorm", "AttendMasked"])
def test_kernels_for_older_gpus_do_not_wait(name: str) -> None:
    assert "griddepcontrol" not in ptx_of(name, 80)


@pytest.mark.parametrize(
    "early",
    [
        "ld.global.b32 {%r1}, [%rd1];",
        "@%p1 st.global.b32 [%rd1], {%r1};",
        "@%p1 bra $L1;",
        "prefetch.global.L2 [%rd1];",
        "ret;",
    ],
)
def test_an_effect_before_the_wait_is_found(early: str) -> None:
    ptx = f"{{ ld.param.b64 %rd1, [p_0]; {early} {WAIT}; {ALLOW}; ret; }}"
    assert len(effects_before_the_wait(ptx)) == 1
