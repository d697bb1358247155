"""Build for target ``cpu``."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from trimode.build.target import BuildTarget, Built, RequestedLimits, option
from trimode.common.extras import requires_extra
from trimode.common.installation import Installation
from trimode.common.progress import Progress
from trimode.engine.manifest import Limits, Manifest
from trimode.engine.targets.cpu import Activations
from trimode.model.checkpoint import Checkpoint
from trimode.model.config import ModelConfig

if TYPE_CHECKING:
    from trimode.build.pass_audit import EngineAudit

DEFAULT_TOP_K = 64


@dataclass(frozen=True, kw_only=True)
class CpuTarget:
    """activations: the inputs of int4 products. ``int8`` rounds them to 8 bits within a product (w4a8), as other CPU
    engines do, and is up to five times as fast. ``fp32`` is exact (w4a16).

    unpacked_bytes: int4 matrices are stored as fp32 if all of them together take at most this many bytes as fp32. Their
    products are then exact. ONNX Runtime unpacks int4 weights in every pass; for weights that fit the CPU's cache,
    4 bits save nothing.

    tp: ranks that the network is divided among (:mod:`trimode.model.shards`). It must divide the number of KV heads.
    """

    name: ClassVar[str] = "cpu"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")

    activations: Activations = field(
        default="int8", metadata=option("Inputs of int4 products: int8 is fast, fp32 is exact.")
    )
    unpacked_bytes: int = 16 << 20
    tp: int = field(default=1, metadata=option("Tensor parallelism: ranks (processes) to divide the network among."))

    @property
    def dtype(self) -> Literal["fp32"]:
        return "fp32"

    def limits(self, config: ModelConfig, requested: RequestedLimits) -> Limits:
        return Limits(
            capacity=requested.capacity or config.max_position_embeddings,
            prefill_step=requested.prefill_step,
            top_k=min(requested.top_k or DEFAULT_TOP_K, config.vocab_size),
            max_batch=None,
            max_step=None,
        )

    def import_packages(self) -> None:
        with requires_extra("build"):
            import_module("trimode.build.cpu.optimised_graphs")

    def build(self, checkpoint: Checkpoint, folder: Path, _limits: Limits, progress: Progress) -> Built:
        from trimode.build.cpu.optimised_graphs import build_cpu_engines

        return build_cpu_engines(checkpoint, folder, self.activations, self.unpacked_bytes, self.tp, progress)

    @classmethod
    def open_audit(cls, engine: Path, _manifest: Manifest) -> EngineAudit:
        from trimode.build.pass_audit import no_kernels

        raise no_kernels(engine, cls.name)

    @classmethod
    def can_build(cls, installation: Installation) -> str:
        return "builds" if installation.has("onnx") else "does not build: pip install 'trimode[build]'"


TARGET: type[BuildTarget] = CpuTarget
