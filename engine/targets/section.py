"""What every target's section of the manifest has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pydantic import PositiveInt

from trimode.engine.record import Record


class TargetSection(Record, ABC):
    """The part of a manifest that only one target writes and reads. ``name`` is the target's."""

    name: str

    @property
    @abstractmethod
    def engine_files(self) -> tuple[str, ...]:
        """Names of the files that the folders ``ar`` and ``diffusion`` must hold."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """What the engine was built for, in one line."""


class KernelSection(TargetSection):
    """Of targets with kernels of our own, whose directories have the same pool and the same kernels.

    sms: compute capabilities that the kernels were compiled for, 121 for 12.1.
    """

    sms: tuple[PositiveInt, ...]


def compute_capabilities(sms: tuple[int, ...]) -> str:
    """E.g. ``compute capability 12.1, 8.9`` for 121 and 89."""
    return f"compute capability {', '.join(f'{sm // 10}.{sm % 10}' for sm in sms)}"
