"""What targets with kernels of our own share. Their directories differ in ``ar/``, ``diffusion/`` and the manifest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trimode.build.gpu.gpu_target import GpuTarget
from trimode.build.target import RequestedLimits
from trimode.common.errors import TriModeError
from trimode.common.extras import requires_extra
from trimode.common.progress import Progress
from trimode.engine.manifest import Limits
from trimode.engine.targets.section import KernelSection
from trimode.model.config import ModelConfig
from trimode.plugins.operators.candidates import MOST_CANDIDATES

if TYPE_CHECKING:
    from trimode.build.gpu.kernel_network import KernelNetwork


@dataclass(frozen=True, kw_only=True)
class KernelTarget(GpuTarget, ABC):
    """A target whose engine directories :func:`trimode.build.conversion.convert_engine` reads and writes."""

    name: ClassVar[str]

    def limits(self, config: ModelConfig, requested: RequestedLimits) -> Limits:
        """Raises TriModeError for more candidates than the kernels return."""
        limits = super().limits(config, requested)
        if limits.top_k > MOST_CANDIDATES:
            raise TriModeError(
                f"--top-k is {limits.top_k}; kernels of target {self.name} return at most {MOST_CANDIDATES} candidates"
            )
        return limits

    def import_packages(self) -> None:
        with requires_extra("build"):
            import_module("trimode.build.gpu.kernel_network")

    @abstractmethod
    def write_engines(
        self, network: KernelNetwork, folder: Path, sms: tuple[int, ...], progress: Progress
    ) -> KernelSection:
        """Write ``ar/`` and ``diffusion/`` into ``folder``, which has the pool and kernels for ``sms``.

        Raises TriModeError if the target does not take the network's type.
        """
