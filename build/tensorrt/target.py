"""Build for target ``tensorrt``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from trimode.build.gpu.kernel_target import KernelTarget
from trimode.build.target import BuildTarget, Built, option
from trimode.common.errors import TriModeError
from trimode.common.installation import Installation
from trimode.common.progress import Progress
from trimode.engine.kernel_library import COMPUTE_CAPABILITIES
from trimode.engine.manifest import Limits, Manifest
from trimode.engine.targets.tensorrt import Operators, TensorrtSection, has_tensorrt
from trimode.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from trimode.build.gpu.kernel_network import KernelNetwork
    from trimode.build.pass_audit import EngineAudit


@dataclass(frozen=True, kw_only=True)
class TensorrtTarget(KernelTarget):
    """sms: compute capabilities that the plugins' kernels are compiled for, 121 for 12.1. None: that of this machine's
    GPU, or all known ones with ``emit_only``.

    operators: as in :class:`trimode.engine.targets.tensorrt.TensorrtSection`.

    emit_only: write everything but the plans. ``trimode compile`` adds them on a machine with a GPU.
    """

    name: ClassVar[str] = "tensorrt"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "triton", "tensorrt-cu13", "tensorrt")

    dtype: Literal["bf16", "fp16"] = field(default="bf16", metadata=option("Type of activations and KV pool."))
    sms: tuple[int, ...] | None = field(
        default=None,
        metadata=option(
            "GPUs by compute capability, 121 for 12.1 [default: this machine's, or all known ones with --emit-only].",
            "--sm",
        ),
    )
    operators: Operators = field(
        default="standard",
        metadata=option("Matrix products with 16-bit weights: standard operators, or TriMode's plugins."),
    )
    emit_only: bool = field(
        default=False, metadata=option("Write everything but the plans; `trimode compile` adds them.")
    )

    def build(self, checkpoint: Checkpoint, folder: Path, limits: Limits, progress: Progress) -> Built:
        from trimode.build.gpu.kernel_network import write_pool_and_kernels
        from trimode.build.tensorrt.compiled_directory import require_tensorrt

        gpu = None if self.emit_only else require_tensorrt("or give --emit-only here and run `trimode compile` there")
        sms = self.sms or ((gpu.compute_capability,) if gpu else COMPUTE_CAPABILITIES)
        network = write_pool_and_kernels(checkpoint, folder, self.name, self.dtype, sms, limits, progress)
        section = self.write_engines(network, folder, sms, progress)
        if gpu is not None:
            from trimode.build.tensorrt.plan_compilation import compile_plans

            section = section.model_copy(update={"plans": compile_plans(folder, section, limits, gpu, progress)})
        return Built(section, network.pool.entries(), scales_attention=True)

    def write_engines(
        self, network: KernelNetwork, folder: Path, sms: tuple[int, ...], progress: Progress
    ) -> TensorrtSection:
        from trimode.build.tensorrt.emission import write_graphs

        if network.real == "fp32":
            raise TriModeError("target tensorrt takes bf16 and fp16, and the engine is fp32; build it again")
        plugins = write_graphs(network, folder, self.operators, progress)
        return TensorrtSection(sms=sms, operators=self.operators, plugins=plugins, plans=None)

    @classmethod
    def open_audit(cls, engine: Path, _manifest: Manifest) -> EngineAudit:
        from trimode.build.pass_audit import no_kernels

        raise no_kernels(engine, cls.name)

    @classmethod
    def can_build(cls, installation: Installation) -> str:
        if not installation.has("onnx", "triton"):
            return "does not build: pip install 'trimode[build]'"
        if not has_tensorrt(installation):
            return "builds with --emit-only; to compile: pip install 'trimode[tensorrt]' on a machine with a GPU"
        if not installation.gpus.found:
            return "builds with --emit-only; to compile it needs an NVIDIA GPU and its driver"
        return "builds"


TARGET: type[BuildTarget] = TensorrtTarget
