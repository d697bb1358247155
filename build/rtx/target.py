"""Build for target ``rtx``."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from trimode.build.gpu.gpu_target import GpuTarget
from trimode.build.target import BuildTarget, Built, option
from trimode.common.extras import requires_extra
from trimode.common.installation import Installation
from trimode.common.progress import Progress
from trimode.engine.manifest import Limits, Manifest
from trimode.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from trimode.build.pass_audit import EngineAudit


@dataclass(frozen=True, kw_only=True)
class RtxTarget(GpuTarget):
    """sms: compute capabilities, 121 for 12.1. The plans run on these GPUs only.

    tp: ranks that the network is divided among (:mod:`trimode.model.shards`), each on a GPU of its own. It must leave
    each rank two KV heads. Such plans are built and audited; the runtime does not run them.
    """

    name: ClassVar[str] = "rtx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "tensorrt-rtx-cu13")

    dtype: Literal["bf16", "fp16"] = field(default="bf16", metadata=option("Type of activations and KV pool."))
    sms: tuple[int, ...] = field(
        default=(121, 120, 89), metadata=option("GPUs by compute capability, 121 for 12.1.", "--sm")
    )
    tp: int = field(default=1, metadata=option("Tensor parallelism: ranks (GPUs) to divide the network among."))

    def import_packages(self) -> None:
        with requires_extra("build,rtx"):
            import_module("trimode.build.rtx.plan_building")

    def build(self, checkpoint: Checkpoint, folder: Path, limits: Limits, progress: Progress) -> Built:
        from trimode.build.rtx.plan_building import build_plans

        return build_plans(checkpoint, folder, self, limits, progress)

    @classmethod
    def open_audit(cls, engine: Path, manifest: Manifest) -> EngineAudit:
        with requires_extra("build"):
            from trimode.build.rtx.audit import PlanAudit

        return PlanAudit(engine, manifest)

    @classmethod
    def can_build(cls, installation: Installation) -> str:
        if not installation.has("onnx", "tensorrt-rtx-cu13"):
            return "does not build: pip install 'trimode[build,rtx]'"
        return "builds and audits, with or without a GPU"


TARGET: type[BuildTarget] = RtxTarget
