"""Build for target ``cuda``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from trimode.build.gpu.kernel_target import KernelTarget
from trimode.build.target import BuildTarget, Built, option
from trimode.common.errors import TriModeError
from trimode.common.extras import requires_extra
from trimode.common.gpus import find_gpus
from trimode.common.installation import Installation
from trimode.common.progress import Progress
from trimode.engine.files import rank_folder
from trimode.engine.kernel_library import COMPUTE_CAPABILITIES
from trimode.engine.manifest import Limits, Manifest
from trimode.engine.targets.cuda import CudaSection
from trimode.model.checkpoint import Checkpoint
from trimode.plugins.operators.all_reduce import MOST_RANKS

if TYPE_CHECKING:
    from trimode.build.gpu.kernel_network import KernelNetwork
    from trimode.build.pass_audit import EngineAudit


@dataclass(frozen=True, kw_only=True)
class CudaTarget(KernelTarget):
    """dtype: fp32 is for proofs; its products run without tensor cores.

    sms: compute capabilities that kernels are compiled for, 121 for 12.1. None: that of this machine's GPU and 8.0, or
    all known ones on a machine without a GPU. A GPU that is not named runs the newest kernels for 8.x that it can.

    tp: ranks that the network is divided among (:mod:`trimode.model.shards`), each on a GPU of its own. It must divide
    the number of KV heads.
    """

    name: ClassVar[str] = "cuda"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "triton")

    dtype: Literal["bf16", "fp16", "fp32"] = field(
        default="bf16", metadata=option("Type of activations and KV pool; fp32 is slow.")
    )
    sms: tuple[int, ...] | None = field(
        default=None,
        metadata=option(
            "GPUs by compute capability, 121 for 12.1 [default: this machine's, or all known ones].", "--sm"
        ),
    )
    tp: int = field(default=1, metadata=option("Tensor parallelism: ranks (GPUs) to divide the network among."))

    def build(self, checkpoint: Checkpoint, folder: Path, limits: Limits, progress: Progress) -> Built:
        from trimode.build.gpu.kernel_network import write_ranks

        if self.tp > MOST_RANKS:
            raise TriModeError(f"--tp {self.tp}: target {self.name} has at most {MOST_RANKS} ranks")
        sms = self.sms or _sms_of_this_machine()
        networks = write_ranks(checkpoint, folder, self.name, self.dtype, sms, limits, self.tp, progress)
        for rank, network in enumerate(networks):
            self.write_engines(network, folder / rank_folder(rank, self.tp), sms, progress)
        return Built(CudaSection(sms=sms), networks[0].pool.entries(), self.tp, scales_attention=True)

    def write_engines(
        self, network: KernelNetwork, folder: Path, sms: tuple[int, ...], progress: Progress
    ) -> CudaSection:
        from trimode.build.cuda.emission import write_launches

        write_launches(network, folder, progress)
        return CudaSection(sms=sms)

    @classmethod
    def open_audit(cls, engine: Path, manifest: Manifest) -> EngineAudit:
        with requires_extra("build"):
            from trimode.build.cuda.audit import LaunchAudit

        return LaunchAudit(engine, manifest)

    @classmethod
    def can_build(cls, installation: Installation) -> str:
        return "builds" if installation.has("onnx", "triton") else "does not build: pip install 'trimode[build]'"


def _sms_of_this_machine() -> tuple[int, ...]:
    """Those of the GPUs here that kernels can be compiled for, and 8.0, whose kernels run on every later GPU."""
    found = {gpu.compute_capability for gpu in find_gpus().found} & {*COMPUTE_CAPABILITIES}
    return tuple(sorted({COMPUTE_CAPABILITIES[0], *found})) if found else COMPUTE_CAPABILITIES


TARGET: type[BuildTarget] = CudaTarget
