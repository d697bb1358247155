"""Folder ``kernels/``: compiled kernels, which TensorRT embeds in its plans without a compiler.

```
kernels/sm_90/kernels.json     what a launch of each kernel needs
kernels/sm_90/<kernel>.ptx     its PTX, which the driver compiles for later GPUs
kernels/sm_90/<kernel>.cubin   its binary for this GPU
```
One folder for each compute capability. A kernel that does not fit a GPU is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import PositiveInt

from trimode.common.errors import TriModeError
from trimode.common.records import read_json_record
from trimode.engine.precision import Real
from trimode.engine.record import Record

KERNELS = "kernels"
INDEX = "kernels.json"
# GPUs that kernels can be compiled for; 121 is compute capability 12.1.
COMPUTE_CAPABILITIES = (80, 86, 89, 90, 100, 120, 121)
# The first compute capability whose kernels run on that GPU only.
FIRST_SPECIFIC = 90


class LibraryKernel(Record):
    """``entry``: name of the function in the PTX. ``threads`` of a block. ``shared_bytes`` of dynamic shared memory."""

    entry: str
    threads: PositiveInt
    shared_bytes: int


class LibraryIndex(Record):
    """``kernels.json``. compute_capability: 121 is 12.1. real: type of the activations. kernels: by name."""

    compute_capability: PositiveInt
    real: Real
    kernels: dict[str, LibraryKernel]

    def write(self, folder: Path) -> None:
        """folder: of :func:`library_folder`."""
        (folder / INDEX).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


class KernelLibrary:
    """The kernels for one compute capability, 121 for 12.1. Raises TriModeError if ``folder`` has none for it."""

    def __init__(self, folder: Path, compute_capability: int) -> None:
        self._folder = library_folder(folder, compute_capability)
        if not self._folder.is_dir():
            raise _no_kernels(folder, compute_capability)
        self.index = read_json_record(LibraryIndex, self._folder / INDEX)

    def available(self, names: Mapping[int, str]) -> list[int]:
        """The tactics whose kernels are here. names: a kernel's names by tactic.

        Raises TriModeError if none is.
        """
        found = [tactic for tactic, name in names.items() if name in self.index.kernels]
        if not found:
            raise TriModeError(f"{self._folder / INDEX} lacks {min(names.values())}; build the engine again")
        return found

    def find(self, name: str) -> LibraryKernel:
        """How the kernel is launched."""
        return self.index.kernels[name]

    def ptx(self, name: str) -> bytes:
        return (self._folder / f"{name}.ptx").read_bytes()

    def cubin(self, name: str) -> bytes:
        return (self._folder / f"{name}.cubin").read_bytes()


def library_folder(folder: Path, compute_capability: int) -> Path:
    return folder / f"sm_{compute_capability}"


def runs_on(sm: int, compute_capability: int) -> bool:
    """Whether a GPU of this compute capability runs kernels that were compiled for ``sm``."""
    return sm == compute_capability or (sm < FIRST_SPECIFIC and sm < compute_capability)


def library_for(folder: Path, compute_capability: int) -> int:
    """The compute capability whose kernels a GPU runs: its own, or the newest that its driver can compile for it.

    PTX for 8.x runs on every later GPU. From 9.0 on, kernels use instructions of their own GPU and run on no other.
    Raises TriModeError if no kernels can run.
    """
    present = _present(folder)
    usable = [sm for sm in present if runs_on(sm, compute_capability)]
    if not usable:
        raise _no_kernels(folder, compute_capability)
    return max(usable)


def _present(folder: Path) -> list[int]:
    names = (path.name.removeprefix("sm_") for path in folder.glob("sm_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _no_kernels(folder: Path, compute_capability: int) -> TriModeError:
    there = ", ".join(map(str, _present(folder))) or "none"
    return TriModeError(
        f"{folder} has kernels for compute capabilities {there}, and this GPU's is {compute_capability}; "
        f"build with --sm {compute_capability}"
    )
