"""Compile the kernels that the graphs of an engine need. The GPUs need not be present."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnx

from trimode.common.errors import TriModeError
from trimode.common.progress import Progress
from trimode.engine.kernel_library import COMPUTE_CAPABILITIES, LibraryIndex, LibraryKernel, library_folder
from trimode.engine.precision import Real
from trimode.model.checkpoint import Checkpoint
from trimode.plugins.compilation import compile_operator
from trimode.plugins.operators import DOMAIN, Constants, Node, Operator, Tactic
from trimode.plugins.operators.int4_product import LEAST_GROUP

_WARP = 32


class NeededKernel(NamedTuple):
    operator: Operator
    constants: Constants
    tactic: Tactic


def plugin_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in graph.graph.node if node.domain == DOMAIN]


def kernels_of(operator: Operator, node: Node) -> dict[str, NeededKernel]:
    """Every tactic of one node, by the name of its kernel."""
    constants = operator.constants(node)
    return {
        operator.kernel_name(node, number): NeededKernel(operator, constants, tactic)
        for number, tactic in operator.compiled_tactics(node).items()
    }


def write_kernels(
    needed: dict[str, NeededKernel], real: Real, sms: tuple[int, ...], folder: Path, progress: Progress
) -> None:
    """Compile each kernel for each compute capability (121 for 12.1) into ``folder``, a :class:`KernelLibrary`'s.

    A tactic that does not fit a GPU is omitted for this GPU. Raises TriModeError if no tactic of an operator fits.
    """
    done, total = 0, len(sms) * len(needed)

    def count() -> None:
        nonlocal done
        done += 1
        progress("kernels", done, total)

    for sm in sms:
        written = write_library(needed, real, sm, folder, count)
        if lacking := {_untuned(name) for name in needed} - {_untuned(name) for name in written}:
            raise TriModeError(
                f"every tactic of {min(lacking)} spills registers, or lacks shared memory, on compute capability {sm}"
            )


def write_library(
    needed: dict[str, NeededKernel], real: Real, sm: int, folder: Path, compiled_one: Callable[[], None]
) -> list[str]:
    """Compile each kernel for one compute capability. Returns the names of those that fit the GPU, which are written.

    compiled_one: called after each kernel.
    """
    target = library_folder(folder, sm)
    target.mkdir(parents=True)
    index = {}
    for name, kernel in needed.items():
        compiled = compile_operator(kernel.operator, kernel.constants, kernel.tactic, real, sm)
        if compiled.fits:
            (target / f"{name}.ptx").write_text(compiled.ptx, encoding="ascii")
            (target / f"{name}.cubin").write_bytes(compiled.cubin)
            threads = compiled.warps * _WARP
            index[name] = LibraryKernel(entry=compiled.name, threads=threads, shared_bytes=compiled.shared_bytes)
        compiled_one()
    LibraryIndex(compute_capability=sm, real=real, kernels=index).write(target)
    return list(index)


def _untuned(name: str) -> str:
    """The name of a kernel without its tactic."""
    return name.rpartition(".")[0]


def refuse_unknown_gpus(sms: tuple[int, ...]) -> None:
    """Raise TriModeError for a compute capability that no kernel can be compiled for."""
    for sm in sms:
        if sm not in COMPUTE_CAPABILITIES:
            raise TriModeError(f"--sm {sm}: kernels are compiled for {', '.join(map(str, COMPUTE_CAPABILITIES))}")


def refuse_odd_groups(checkpoint: Checkpoint, target: str) -> None:
    """Raise TriModeError for groups of int4 weights that the kernels cannot multiply."""
    quantization = checkpoint.quantization
    if quantization is not None and quantization.group_size % LEAST_GROUP:
        raise TriModeError(
            f"{checkpoint.folder} is int4 in groups of {quantization.group_size}; target {target} takes multiples of "
            f"{LEAST_GROUP}"
        )
