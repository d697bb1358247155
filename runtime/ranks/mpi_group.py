"""The sums of ranks by MPI."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimode.common.errors import TriModeError

# A sum is usually complete within microseconds. A rank that waits longer leaves the CPU to the others.
_YIELDS, _FIRST_SLEEP, _LONGEST_SLEEP = 100, 2e-5, 1e-3


class MpiGroup:
    """All ranks of the MPI job that this process was started in. ranks: the number that there must be.

    parent: the process that started it. When that is gone, a rank that waits for a sum exits, since no other rank may
    come any more.
    """

    def __init__(self, ranks: int) -> None:
        try:
            import mpi4py
        except ImportError:
            raise TriModeError("mpi4py is missing; pip install 'trimode[mpi]'") from None
        mpi4py.rc.finalize = False  # it would wait for ranks that may have died
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise TriModeError(f"mpi4py finds no MPI ({error}); pip install 'trimode[mpi]'") from None

        self._world = MPI.COMM_WORLD
        self._parent = os.getppid()
        if self._world.size != ranks:
            library = MPI.Get_library_version().split("\n")[0].strip()
            raise TriModeError(
                f"{library} has {self._world.size} ranks where {ranks} were started; use MPICH: "
                "pip install 'trimode[mpi]' in an environment without another MPI"
            )
        self.rank = int(self._world.rank)
        self._ranks = ranks
        self._wait(self._world.Ibarrier())
        if self.rank == 0:
            _unlink_shared_memory()
        self._wait(self._world.Ibarrier())

    def gathered(self, item: bytes) -> list[bytes]:
        items = np.empty((self._ranks, len(item)), np.uint8)
        self._wait(self._world.Iallgather(np.frombuffer(item, np.uint8), items))
        return [row.tobytes() for row in items]

    def total(self, partial: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = np.empty((self._ranks, *partial.shape), np.float32)
        self._wait(self._world.Iallgather(np.ascontiguousarray(partial), parts))
        total: NDArray[np.float32] = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def _wait(self, request: object) -> None:
        """Wait without spinning: MPI's own waiting would take a whole core."""
        yields, sleep = 0, _FIRST_SLEEP
        while not request.Test():  # type: ignore[attr-defined]
            if yields < _YIELDS:
                yields += 1
                os.sched_yield()
                continue
            if os.getppid() != self._parent:
                os._exit(1)
            time.sleep(sleep)
            sleep = min(2 * sleep, _LONGEST_SLEEP)


def _unlink_shared_memory() -> None:
    """Remove the names of MPI's shared memory, which every rank has mapped by now. The memory itself then goes with the
    last process, however that ends.
    """
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    for path in set(re.findall(r"/dev/shm/mpich_shm\S+$", maps, re.MULTILINE)):  # noqa: S108 - a name, not made
        Path(path).unlink(missing_ok=True)
