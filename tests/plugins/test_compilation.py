"""What comes out of the compiler: PTX with the operator's parameters and no others, and binaries that do not spill.

In bf16, a build's default: one of each kind of kernel for two GPUs, the heaviest for others.
``python -m scripts.gpu.kernel_table resources`` has all kernels for all GPUs, and fp16.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from scripts.gpu.kernel_table import ATTENTION, PRODUCTS_8B
from trimode.build.tensorrt.kernel_emission import NeededKernel, write_kernels
from trimode.common.errors import TriModeError
from trimode.common.progress import no_progress
from trimode.plugins import contracts
from trimode.plugins.compilation import (
    SHARED_MEMORY,
    CompiledKernel,
    compile_operator,
    kernel_of,
)
from trimode.plugins.contracts import Constants, Operator, Tactic
from trimode.plugins.kernel_library import KernelLibrary, kernel_name

ADAPTED = PRODUCTS_8B["o"]
KERNELS: dict[str, tuple[Operator, Constants, Tactic]] = {
    "write": (contracts.KV_WRITE, contracts.kv_write_constants(ATTENTION), contracts.KV_WRITE_TACTICS[0]),
    "attention, few rows": (
        contracts.attend("bidirectional"),
        contracts.attend_constants(ATTENTION),
        contracts.ATTEND_TACTICS[0],
    ),
    "attention, many rows": (
        contracts.attend("masked"),
        contracts.attend_constants(ATTENTION),
        contracts.ATTEND_TACTICS[-1],
    ),
    "merge": (contracts.MERGE, contracts.merge_constants(ATTENTION), contracts.MERGE_TACTICS[0]),
    **{
        f"product, {rows} rows": (
            contracts.int4_product(ADAPTED),
            contracts.int4_product_constants(ADAPTED),
            next(t for t in contracts.INT4_PRODUCT_TACTICS if t.constants["BLOCK_M"] == rows),
        )
        for rows in (4, 32, 128)
    },
}
HEAVIEST = ("attention, many rows", "product, 32 rows", "product, 128 rows")


@pytest.fixture(
    scope="module",
    params=[*product((90, 121), KERNELS), *product((80, 89, 100), HEAVIEST)],
    ids=lambda param: f"sm_{param[0]}, {param[1]}",
)
def compiled(request: pytest.FixtureRequest) -> tuple[Operator, CompiledKernel]:
    capability, name = request.param
    operator, constants, tactic = KERNELS[name]
    return operator, compile_operator(operator, constants, tactic, "bf16", capability)


def test_the_ptx_is_the_operators(compiled: tuple[Operator, CompiledKernel]) -> None:
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


def test_a_tactic_that_spills_is_not_shipped(tmp_path: Path) -> None:
    """Four warps have no registers for 128 splits of four heads, eight have."""
    constants = contracts.merge_constants(replace(ATTENTION, splits=128))
    needed = {
        kernel_name(contracts.MERGE, constants, number): NeededKernel(
            contracts.MERGE, constants, number, Tactic({}, warps=warps, stages=1)
        )
        for number, warps in ((1, 4), (2, 8))
    }
    write_kernels(needed, "fp16", (90,), tmp_path / "both", no_progress)
    library = KernelLibrary(tmp_path / "both", 90)
    assert library.tactics(contracts.MERGE, constants, (1, 2)) == [2]
    assert [path.stem for path in (tmp_path / "both/sm_90").glob("*.ptx")] == [list(needed)[1]]
    needed.popitem()
    with pytest.raises(TriModeError, match=r"every tactic of MergeSplits\..*SPLITS128 spills .* capability 90"):
        write_kernels(needed, "fp16", (90,), tmp_path / "one", no_progress)


def test_what_ptxas_would_spill_gets_more_registers() -> None:
    """Left to itself, it stops at 168 registers."""
    tactic = next(tactic for tactic in contracts.INT4_PRODUCT_TACTICS if tactic.constants["BLOCK_M"] == 64)
    kernel = compile_operator(
        contracts.int4_product(ADAPTED), contracts.int4_product_constants(ADAPTED), tactic, "bf16", 86
    )
    assert ".maxnreg" in kernel.ptx
    assert kernel.resources.registers > 168
    assert not kernel.resources.spills


def test_an_unknown_gpu_is_refused() -> None:
    operator, constants, tactic = KERNELS["merge"]
    with pytest.raises(TriModeError, match="75; known are 80"):
        compile_operator(operator, constants, tactic, "fp16", 75)
