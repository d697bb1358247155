"""Compiled kernels: the PTX has exactly the operator's parameters, and the binaries do not spill.

In bf16, the default of a build: one kernel of each kind for two GPUs, the ones with most registers for the others.
``python -m scripts.gpu.kernel_table resources`` covers all kernels, all GPUs, and fp16.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from triton.compiler import ASTSource

from scripts.gpu import graph_checks
from scripts.gpu.kernel_launch import tile_name
from scripts.gpu.kernels_8b import ATTENTION, PRODUCTS, QKV, SPLITS, qkv_node
from trimode.build.gpu.kernel_emission import kernels_of, write_kernels
from trimode.common.errors import TriModeError
from trimode.common.progress import no_progress
from trimode.engine.kernel_library import KernelLibrary
from trimode.plugins import compilation
from trimode.plugins.compilation import SHARED_MEMORY, CompiledKernel, compile_operator, kernel_of
from trimode.plugins.operators import Attend, Head, KvWrite, MergeSplits, Node, Operator, Tactic

ADAPTED, WIDE = PRODUCTS["o with adapter"], PRODUCTS["gate_up"]


def attention_kernel(operator: Attend, tactic: Tactic) -> tuple[Operator, Node, Tactic]:
    return operator, operator.node(batch=1, step=1, capacity=1, splits=SPLITS, **ATTENTION), tactic


WRITE = KvWrite.node(batch=1, step=1, capacity=1, **ATTENTION)
QKV_NODE = qkv_node(1, capacity=1)
MERGE = MergeSplits(output_scale=True).node(batch=1, step=1, splits=SPLITS, **ATTENTION)
# Of several nodes of one operator, the last one: the most candidates. Heads with a mask contain those without.
AROUND = {
    o.name: (o, node)
    for o, node in graph_checks.used_nodes(graph_checks.SIZES_8B)
    if not isinstance(o, Head) or o.masked
}
KERNELS: dict[str, tuple[Operator, Node, Tactic]] = {
    "write": (KvWrite(), WRITE, KvWrite.TACTICS[0]),
    "bidirectional attention": attention_kernel(Attend("bidirectional"), Attend.TACTICS[0]),
    **{
        f"masked attention, {tactic.constants['BLOCK_M']} queries": attention_kernel(Attend("masked"), tactic)
        for tactic in Attend.TACTICS
    },
    "merge": (MergeSplits(output_scale=True), MERGE, MergeSplits.TACTICS[0]),
    **{f"qkv product, {tile_name(tactic)}": (QKV, QKV_NODE, tactic) for tactic in QKV.tactics(QKV_NODE).values()},
    **{
        f"product in parts, {tile_name(tactic)}": (ADAPTED.operator, ADAPTED.node(1), tactic)
        for tactic in ADAPTED.operator.tactics(ADAPTED.node(1)).values()
    },
    **{
        f"product, {tile_name(tactic)}": (WIDE.operator, WIDE.node(1), tactic)
        for tactic in WIDE.operator.tactics(WIDE.node(1)).values()
    },
    **{name: (o, node, list(o.tactics(node).values())[-1]) for name, (o, node) in AROUND.items()},
}
# Without wgmma or tcgen05, the largest tiles spill, and are not emitted.
LARGEST = (
    "product in parts, 64 x 64, 4 warps",
    "qkv product, 64 x 128, 4 warps, steps",
    "product, 64 x 128, 4 warps, steps",
)
HEAVIEST = (
    "masked attention, 64 queries",
    "masked attention, 128 queries",
    "qkv product, 64 x 128, 8 warps",
    "product in parts, 32 x 128, 4 warps",
    "product in parts, 64 x 128, 8 warps",
    "product, 64 x 128, 8 warps",
    "MergeCandidates",
    "Rotations",
)


HEADS = ("Int4HeadNormedMasked", "DenseHeadMasked")


@pytest.fixture(
    scope="module",
    params=[
        *product((90,), KERNELS),
        *product((121,), [name for name in KERNELS if name not in LARGEST]),
        *product((100,), [*HEAVIEST, *HEADS, *LARGEST]),
        *product((80,), [*HEAVIEST, *HEADS]),
        *product((86, 89, 120), HEAVIEST),
    ],
    ids=lambda param: f"sm_{param[0]}, {param[1]}",
)
def compiled(request: pytest.FixtureRequest) -> tuple[Operator, CompiledKernel]:
    capability, name = request.param
    operator, node, tactic = KERNELS[name]
    return operator, compile_operator(operator, operator.constants(node), tactic, "bf16", capability)


def test_the_ptx_has_the_operators_parameters(compiled: tuple[Operator, CompiledKernel]) -> None:
    operator, kernel = compiled
    entry, parameters = re.findall(r"\.visible \.entry (\w+)\((.*?)\)", kernel.ptx, re.DOTALL)[0]
    assert entry == kernel.name == kernel_of(operator).fn.__name__
    types = re.findall(r"\.param \.(u\d\d)", parameters)
    scalars = dict.fromkeys(operator.scalars, "u32")
    assert types == [scalars.get(name, "u64") for name in operator.parameters]
    assert re.search(rf"\.target sm_{kernel.compute_capability}a?\b", kernel.ptx)
    assert ".py" not in kernel.ptx
    assert str(Path.home()) not in kernel.ptx


def test_nothing_spills_and_shared_memory_suffices(compiled: tuple[Operator, CompiledKernel]) -> None:
    _, kernel = compiled
    used = kernel.resources
    assert (used.spilled_bytes, used.stack_bytes) == (0, 0)
    assert 0 < used.registers <= 255
    assert kernel.shared_bytes <= SHARED_MEMORY[kernel.compute_capability]


def test_a_tactic_that_spills_is_not_emitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four warps do not have enough registers for 128 splits of four heads, eight have."""
    tactics = (Tactic({}, warps=4, stages=1), Tactic({}, warps=8, stages=1))
    monkeypatch.setattr(MergeSplits, "TACTICS", tactics)
    needed = kernels_of(MergeSplits(), MergeSplits().node(batch=1, step=1, splits=128, **ATTENTION))
    write_kernels(needed, "fp16", (90,), tmp_path / "both", no_progress)
    library = KernelLibrary(tmp_path / "both", 90)
    assert library.available(dict(enumerate(needed, 1))) == [2]
    assert [path.stem for path in (tmp_path / "both/sm_90").glob("*.ptx")] == [list(needed)[1]]
    needed.popitem()
    with pytest.raises(TriModeError, match=r"every tactic of MergeSplits\..*SPLITS128 spills .* capability 90"):
        write_kernels(needed, "fp16", (90,), tmp_path / "one", no_progress)


def test_a_kernel_that_would_spill_gets_more_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ptxas that stops at 64 registers unless the kernel asks for more."""
    assemble, asked = compilation._compile, []

    def sparing(source: ASTSource, tactic: Tactic, capability: int, most: int | None) -> CompiledKernel:
        asked.append(most)
        return assemble(source, tactic, capability, most or 64)

    monkeypatch.setattr(compilation, "_compile", sparing)
    operator, node, tactic = KERNELS["product in parts, 64 x 128, 8 warps"]
    kernel = compile_operator(operator, operator.constants(node), tactic, "bf16", 90)
    assert asked == [None, 255]
    assert kernel.resources.registers > 64
    assert not kernel.resources.spills


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_tiles_with_a_mask_are_summed_as_tiles_without(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """Over threads in the same way. In another order, a query's bits would depend on the length of the step."""
    texts, compiled = [], compilation.triton.compile

    def kept(*arguments: Any, **options: Any) -> Any:
        found = compiled(*arguments, **options)
        texts.append(found.asm["ttgir"])
        return found

    monkeypatch.setattr(compilation.triton, "compile", kept)
    operator, node, tactic = KERNELS["masked attention, 64 queries"]
    compile_operator(operator, operator.constants(node), tactic, "bf16", capability)
    (text,) = texts
    layouts = re.findall(r"\}\) : \(tensor<64x32xf32, (#\w+)>\) -> ", text)
    assert len(layouts) >= 4  # of the maximum and of the sum, with a mask and without
    assert len(set(layouts)) == 1


def test_an_unknown_gpu_is_refused() -> None:
    operator, node, tactic = KERNELS["merge"]
    with pytest.raises(TriModeError, match="75; known are 80"):
        compile_operator(operator, operator.constants(node), tactic, "fp16", 75)
