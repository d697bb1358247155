"""Each process of a parallel test run uses its own CPUs.

Engines on target ``cpu`` use every CPU that their process may use, and threads of ONNX Runtime spin within a pass. Two
processes with two such threads each on two CPUs take about twice as long as with one thread each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY_CPU = os.sched_getaffinity(0)


def share_of(worker: int, workers: int, cpus: set[int]) -> set[int]:
    """The CPUs of one of ``workers`` processes; never none, so processes share CPUs where there are too few."""
    return set(sorted(cpus)[worker % len(cpus) :: workers])


def keep_to_own_share() -> None:
    """Limit this process, its later threads and its children to its share, if pytest-xdist started it."""
    name, workers = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if name and workers:
        os.sched_setaffinity(0, share_of(int(name.removeprefix("gw")), int(workers), _EVERY_CPU))


@contextmanager
def every_cpu() -> Iterator[None]:
    """Lift the limit for what is started inside: threads and processes keep the CPUs that they started with."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _EVERY_CPU)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
