"""Kernel libraries for the driver double, which interprets kernels: writing one takes no time, compiling it minutes.

:mod:`tests.plugins` compiles the kernels.
"""

from __future__ import annotations

import pytest

from trimode.build.gpu import kernel_emission
from trimode.build.gpu.kernel_emission import NeededKernel
from trimode.engine.precision import Real
from trimode.plugins.compilation import CompiledKernel, Resources, kernel_of
from trimode.plugins.operators import Constants, Operator, Tactic


class UncompiledKernels:
    """Replaces the compiler. kernels: by their PTX and by their cubin, which only name the kernel."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kernels: dict[bytes, NeededKernel] = {}
        patch.setattr(kernel_emission, "compile_operator", self._compile)

    def _compile(
        self, operator: Operator, constants: Constants, tactic: Tactic, real: Real, compute_capability: int
    ) -> CompiledKernel:
        ptx = f"// {operator.name} {constants} {tactic} {real} sm_{compute_capability}"
        cubin = b"\x7fELF" + ptx.encode()
        self.kernels[ptx.encode()] = self.kernels[cubin] = NeededKernel(operator, constants, tactic)
        return CompiledKernel(
            name=kernel_of(operator).fn.__name__,
            ptx=ptx,
            cubin=cubin,
            compute_capability=compute_capability,
            warps=tactic.warps,
            shared_bytes=64 << 10,
            resources=Resources(registers=32, spilled_bytes=0, stack_bytes=0),
        )
