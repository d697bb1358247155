"""The kernel tests on a GPU: ``pytest tests/plugins --gpu`` executes compiled kernels in place of the interpreter.

Kernels are compiled beforehand, on any machine, from a list of those that the tests launch. ``pytest tests/plugins
--list-kernels FILE --sm 90`` writes the list, and :func:`compile_kernels` compiles it. Random cases are the same in
both runs, so the list is complete for one version of hypothesis (:func:`draw_the_same_cases_everywhere`). hypothesis
draws other cases after one that was left out, so both runs leave out the same ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import hypothesis
import pytest
import torch
from hypothesis.internal.conjecture import providers
from torch import Tensor

from scripts.gpu.kernel_launch import KernelLaunch
from trimode.engine.kernel_library import KernelLibrary
from trimode.engine.precision import Real
from trimode.plugins.operators import OPERATORS, Constants, Tactic
from trimode.runtime.gpu.device import BoundLaunch, Buffer, Device, Kernel

if TYPE_CHECKING:
    from tests.support.triton_interpreter import Traffic

# Bytes behind each tensor that a kernel must not write.
_GUARD, _GUARD_BYTE = 256, 0xA5
# Kernels in fp32 with more rows in a tile take minutes to compile.
_MOST_FP32_ROWS = 32
_REALS: dict[torch.dtype, Real] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def draw_the_same_cases_everywhere() -> None:
    """Also hypothesis without randomness takes some of its integers from the source of loaded modules, and the machine
    with the GPU loads others. From here on it takes none of them.
    """
    constants = providers.Constants()
    providers._get_local_constants = lambda: constants  # type: ignore[attr-defined]


class TestedKernel(NamedTuple):
    """A kernel that a test launches."""

    real: Real
    operator: str
    constants: Constants
    tactic: Tactic

    @classmethod
    def of(cls, launched: KernelLaunch) -> TestedKernel:
        operator = launched.operator
        operands = (*operator.inputs, *operator.outputs)
        real = next((launched.arguments[operand.name] for operand in operands if operand.type == "real"), None)
        dtype = real.dtype if isinstance(real, Tensor) else torch.float32
        return cls(_REALS[dtype], operator.name, operator.constants(launched.node), launched.tactic)

    @property
    def name(self) -> str:
        sizes = [self.constants, self.tactic.constants, self.tactic.warps, self.tactic.stages]
        return f"{self.operator}.{hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]}"

    @property
    def compiles_soon(self) -> bool:
        return self.real != "fp32" or self.tactic.constants.get("BLOCK_M", 0) <= _MOST_FP32_ROWS

    def fits(self, sm: int) -> bool:
        """Whether it fits a GPU, 90 for 9.0. Some do not, since the tests take any tactic with any sizes."""
        from trimode.plugins.compilation import compile_operator

        return compile_operator(OPERATORS[self.operator], self.constants, self.tactic, self.real, sm).fits


def leave_out(kernel: TestedKernel) -> NoReturn:
    """End the test, or the random case: another one may have a kernel."""
    if hypothesis.currently_in_test_context():
        hypothesis.reject()
    pytest.skip(f"{kernel} is not compiled")


class ListedKernels:
    """Executes launches in the interpreter, and lists their kernels: those that compile within seconds and, if ``sm``
    is given, that fit this GPU. Leaves out what launches others.
    """

    def __init__(self, sm: int | None = None) -> None:
        self._sm = sm
        self._kernels: dict[tuple[Real, str], TestedKernel] = {}
        self._left_out: set[tuple[Real, str]] = set()

    def __call__(self, launched: KernelLaunch) -> dict[str, Traffic]:
        from tests.support.kernel_functions import interpreted

        kernel = TestedKernel.of(launched)
        key = kernel.real, kernel.name
        if key not in self._kernels and key not in self._left_out:
            if kernel.compiles_soon and (self._sm is None or kernel.fits(self._sm)):
                self._kernels[key] = kernel
            else:
                self._left_out.add(key)
        if key in self._left_out:
            leave_out(kernel)
        return interpreted(launched)

    def write(self, file: Path) -> None:
        listed = [
            (kernel.real, kernel.operator, kernel.constants, *astuple(kernel.tactic))
            for _, kernel in sorted(self._kernels.items())
        ]
        file.write_text(json.dumps(listed) + "\n", encoding="utf-8")


def listed_kernels(file: Path) -> Iterator[TestedKernel]:
    for real, operator, constants, tiles, warps, stages in json.loads(file.read_text(encoding="utf-8")):
        yield TestedKernel(real, operator, constants, Tactic(tiles, warps=warps, stages=stages))


def compile_kernels(file: Path, folder: Path, sm: int) -> int:
    """Compile the kernels of a list for one GPU, 90 for 9.0, into ``folder``. Returns the number of those that fit
    it.
    """
    from trimode.build.gpu.kernel_emission import NeededKernel, write_library

    needed: dict[Real, dict[str, NeededKernel]] = {}
    for kernel in listed_kernels(file):
        entry = NeededKernel(OPERATORS[kernel.operator], kernel.constants, kernel.tactic)
        needed.setdefault(kernel.real, {})[kernel.name] = entry
    return sum(len(write_library(kernels, real, sm, folder / real, lambda: None)) for real, kernels in needed.items())


class GpuKernels:
    """Executes launches on the first GPU, from the kernels in ``folder``. missing: kernels that are not there."""

    def __init__(self, folder: Path) -> None:
        self._device = Device(0)
        self._folder = folder
        self._libraries: dict[Real, KernelLibrary] = {}
        self._loaded: dict[tuple[Real, str], Kernel] = {}
        self.launches = 0
        self.missing: set[tuple[Real, str]] = set()

    def __call__(self, launched: KernelLaunch) -> dict[str, Traffic]:
        """Copies the tensors to the GPU and back. Two names of the same memory stay the same memory."""
        kernel, device, operator = self._find(TestedKernel.of(launched)), self._device, launched.operator
        memory: dict[int, tuple[Tensor, Buffer]] = {}
        for tensor in launched.arguments.values():
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in memory:
                memory[tensor.data_ptr()] = tensor, self._store(tensor)

        def address(name: str) -> int:
            argument: Any = launched.arguments[name]
            return memory[argument.data_ptr()][1].address

        bound = BoundLaunch(
            kernel,
            launched.grid,
            [address(operand.name) for operand in operator.inputs],
            [int(value) for value in operator.scalar_values(launched.node)],
            [memory[tensor.data_ptr()][1].address for tensor in launched.outputs],
        )
        device.launch_kernel(bound)
        guards = [(tensor, *self._load(tensor, buffer)) for tensor, buffer in memory.values()]
        device.synchronize()
        for tensor, content, guard in guards:
            assert bool((guard == _GUARD_BYTE).all()), f"{operator.name} writes behind a tensor"
            tensor.view(-1).view(torch.uint8).copy_(content)
        self.launches += 1
        return {}

    @property
    def summary(self) -> str:
        """A line for the report, which :mod:`scripts.gpu.kernel_tests` reads."""
        return f"{self.launches} launches on the GPU, {len(self.missing)} kernels missing"

    def _find(self, tested: TestedKernel) -> Kernel:
        key = tested.real, tested.name
        if key in self._loaded:
            return self._loaded[key]
        if tested.real not in self._libraries:
            self._libraries[tested.real] = KernelLibrary(self._folder / tested.real, self._device.compute_capability)
        library = self._libraries[tested.real]
        if tested.name not in library.index.kernels:
            self.missing.add(key)
            leave_out(tested)
        entry = library.find(tested.name)
        image = library.cubin(tested.name)
        self._loaded[key] = self._device.load_kernel(image, entry.entry, entry.threads, entry.shared_bytes)
        return self._loaded[key]

    def _store(self, tensor: Tensor) -> Buffer:
        guard = torch.full((_GUARD,), _GUARD_BYTE, dtype=torch.uint8)
        content = torch.cat((tensor.reshape(-1).view(torch.uint8), guard))
        return self._device.store(content.numpy(), "a tensor of a test")

    def _load(self, tensor: Tensor, buffer: Buffer) -> tuple[Tensor, Tensor]:
        """The content of a tensor and of the guard behind it, once the stream is synchronised."""
        content = torch.empty(buffer.size, dtype=torch.uint8)
        self._device.download(content.data_ptr(), buffer.address, buffer.size)
        return content[: tensor.nbytes], content[tensor.nbytes :]
