"""Compile a kernel to PTX for any GPU, present or not, and read the resources that its binary uses.

ptxas prefers to spill a few registers over running fewer blocks at once. A kernel that spills is compiled again with
the most registers a thread can have. The driver that finally assembles the PTX may be another version of ptxas.

The PTX is embedded in an engine, so its parameters are exactly the operator's inputs, scalars and outputs: Triton's two
trailing scratch pointers, which these kernels never use, are removed. It contains no source paths.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from trimode.common.errors import TriModeError
from trimode.engine.precision import Real
from trimode.model.step import ElementType
from trimode.plugins.operators import Constants, Operator, Tactic

# PTX of CUDA 12.9: the first version that has every GPU below. All later drivers read it.
PTX_VERSION = 88
# Most bytes of shared memory of a block, by compute capability: CUDA programming guide, technical specifications.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, 121: 101376}

_ELEMENTS: dict[ElementType, str] = {"fp32": "fp32", "int64": "i64", "int32": "i32", "bool": "i1", "int8": "i8"}
_WARP = 32
# Most registers of a thread and of a multiprocessor, from the same table.
_THREAD_REGISTERS, _REGISTERS = 255, 65536


@dataclass(frozen=True)
class Resources:
    """Of one thread, as ptxas reports them: registers, bytes spilled and read back, bytes of stack."""

    registers: int
    spilled_bytes: int
    stack_bytes: int

    @property
    def spills(self) -> bool:
        return self.spilled_bytes + self.stack_bytes > 0


@dataclass(frozen=True)
class CompiledKernel:
    """cubin: the binary that ptxas made of the PTX. A launch needs ``warps`` of 32 threads and ``shared_bytes`` of
    dynamic shared memory.
    """

    name: str
    ptx: str
    cubin: bytes
    compute_capability: int
    warps: int
    shared_bytes: int
    resources: Resources

    @property
    def fits(self) -> bool:
        """Whether it spills nothing and its shared memory is within the GPU's limit."""
        return not self.resources.spills and self.shared_bytes <= SHARED_MEMORY[self.compute_capability]


def kernel_of(operator: Operator) -> JITFunction[Any]:
    module, name = operator.kernel.split(".")
    kernel: JITFunction[Any] = getattr(import_module(f"trimode.plugins.kernels.{module}"), name)
    return kernel


def compile_operator(
    operator: Operator, constants: Constants, tactic: Tactic, real: Real, compute_capability: int
) -> CompiledKernel:
    """compute_capability: 121 for 12.1. Raises TriModeError if it is not in :data:`SHARED_MEMORY`."""
    if compute_capability not in SHARED_MEMORY:
        known = ", ".join(str(capability) for capability in SHARED_MEMORY)
        raise TriModeError(f"no kernel is compiled for compute capability {compute_capability}; known are {known}")
    kernel = kernel_of(operator)
    types = {
        **{tensor.name: f"*{_ELEMENTS.get(tensor.type, real)}" for tensor in (*operator.inputs, *operator.outputs)},
        **dict.fromkeys(operator.scalars, "i32"),
    }
    fixed: dict[str, Any] = {
        **{name: None for name in kernel.arg_names if name not in types},
        **constants,
        **tactic.constants,
    }
    launched = {"CAPABILITY": compute_capability, "STAGES": tactic.stages}
    fixed |= {name: value for name, value in launched.items() if name in kernel.arg_names}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        fixed,
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if types.get(name, "").startswith("*")
        },
    )
    compiled = _compile(source, tactic, compute_capability, None)
    if compiled.resources.spills:
        most = min(_THREAD_REGISTERS, _REGISTERS // (tactic.warps * _WARP))
        compiled = _compile(source, tactic, compute_capability, most)
    return compiled


def _compile(source: ASTSource, tactic: Tactic, compute_capability: int, most_registers: int | None) -> CompiledKernel:
    options = {
        "num_warps": tactic.warps,
        "num_stages": tactic.stages,
        "maxnreg": most_registers,
        "ptx_version": PTX_VERSION,
        "enable_fp_fusion": True,
    }
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        compiled = triton.compile(source, target=GPUTarget("cuda", compute_capability, _WARP), options=options)
    name, parameters = compiled.metadata.name, sum(kind != "constexpr" for kind in source.signature.values())
    ptx = _without_scratch(compiled.asm["ptx"], parameters)
    cubin, resources = _assembled(name, ptx, compute_capability)
    return CompiledKernel(name, ptx, cubin, compute_capability, tactic.warps, compiled.metadata.shared, resources)


def _assembled(name: str, ptx: str, compute_capability: int) -> tuple[bytes, Resources]:
    """Assemble the PTX with Triton's ptxas. Returns the binary, and what ptxas reports of it."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        architecture = sm_arch_from_capability(compute_capability)
        command = [get_ptxas(compute_capability).path, "-v", f"--gpu-name={architecture}", str(source)]
        assembled = subprocess.run([*command, "-o", str(binary)], capture_output=True, text=True)  # noqa: S603
        if assembled.returncode:
            raise TriModeError(f"ptxas refuses {name} for {architecture}: {assembled.stderr.strip()}")
        return binary.read_bytes(), Resources(
            registers=_number(r"Used (\d+) registers", assembled.stderr),
            spilled_bytes=_number(r"(\d+) bytes spill stores", assembled.stderr)
            + _number(r"(\d+) bytes spill loads", assembled.stderr),
            stack_bytes=_number(r"(\d+) bytes stack frame", assembled.stderr),
        )


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise TriModeError(f"ptxas reported no {pattern!r}: {log.strip()}")
    return int(found[1])


def _without_scratch(ptx: str, parameters: int) -> str:
    """The PTX with its first ``parameters`` parameters only. The two others must be unused."""
    head, signature, body = re.split(r"(\.visible \.entry [^)]*\))", ptx, maxsplit=1)
    declared = re.findall(r"\.param [^,)]*?(\w+)(?=[,\s)])(?=\s*[,)])", signature)
    scratch = declared[parameters:]
    if len(scratch) != 2 or any(re.search(rf"\b{name}\b", body) for name in scratch):
        raise TriModeError(f"the kernel has {len(declared)} parameters where {parameters} and two unused were expected")
    kept = re.split(r",\s*(?=\.param)", signature)[:parameters]
    return head + ",\n\t".join(kept) + "\n)" + body
