"""Compiled kernels in a folder: what a build on another machine embeds, with neither Triton nor a compiler there.

``sm_90/kernels.json`` says of each kernel what a launch needs; its PTX lies beside it under the same name. Tactics that
do not fit a GPU are not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt

from trimode.common.errors import TriModeError
from trimode.common.records import read_json_record
from trimode.engine.precision import Real
from trimode.plugins.contracts import Constants, Operator

INDEX = "kernels.json"


class LibraryKernel(BaseModel):
    """``entry``: the kernel's name in its PTX. ``threads`` a block, ``shared_bytes`` of dynamic shared memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entry: str
    threads: PositiveInt
    shared_bytes: int


class LibraryIndex(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    compute_capability: PositiveInt
    real: Real
    kernels: dict[str, LibraryKernel]


class KernelLibrary:
    """The kernels for one compute capability, 121 for 12.1; raises TriModeError if ``folder`` has none for it."""

    def __init__(self, folder: Path, compute_capability: int) -> None:
        self._folder = library_folder(folder, compute_capability)
        if not self._folder.is_dir():
            there = sorted(int(path.name.removeprefix("sm_")) for path in folder.glob("sm_*"))
            raise TriModeError(
                f"{folder} has kernels for compute capabilities {', '.join(map(str, there))}, and this GPU's is "
                f"{compute_capability}; build with --sm {compute_capability}"
            )
        self.index = read_json_record(LibraryIndex, self._folder / INDEX)

    def tactics(self, operator: Operator, constants: Constants, tactics: Iterable[int]) -> list[int]:
        """Those of them that fit this GPU; raises TriModeError if none was compiled."""
        names = {tactic: kernel_name(operator, constants, tactic) for tactic in tactics}
        found = [tactic for tactic, name in names.items() if name in self.index.kernels]
        if not found:
            raise TriModeError(f"{self._folder / INDEX} lacks {min(names.values())}; build the engine again")
        return found

    def find(self, operator: Operator, constants: Constants, tactic: int) -> tuple[LibraryKernel, str]:
        """What to launch, and its PTX."""
        name = kernel_name(operator, constants, tactic)
        return self.index.kernels[name], (self._folder / f"{name}.ptx").read_text(encoding="ascii")


def library_folder(folder: Path, compute_capability: int) -> Path:
    return folder / f"sm_{compute_capability}"


def kernel_name(operator: Operator, constants: Constants, tactic: int) -> str:
    """E.g. ``AttendMasked.KV_HEADS8.GROUP4.HEAD_DIM128.tactic1``."""
    return ".".join((operator.name, *(f"{name}{value}" for name, value in constants.items()), f"tactic{tactic}"))
