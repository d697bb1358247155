"""Checkpoint to engine directory: the engines, the adapter, the tokenizer and the manifest, whole or not at all."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np
import onnxruntime
from safetensors.numpy import save

from trimode.build.cpu.engines import build_cpu_engines
from trimode.build.graph.network import NetworkOptions, PluginOptions
from trimode.build.tensorrt.compile import require_tensorrt
from trimode.build.tensorrt.graphs import COMPUTE_CAPABILITIES, SPLITS, write_graphs
from trimode.common.atomic_folder import atomic_folder
from trimode.common.errors import TriModeError
from trimode.common.machine import instruction_set
from trimode.common.progress import Progress, no_progress
from trimode.common.version import __version__
from trimode.engine.files import ADAPTER, TOKENIZER, hash_files
from trimode.engine.manifest import FORMAT_VERSION, AdapterEntry, Limits, Manifest, PoolEntry
from trimode.engine.precision import Precision, Real
from trimode.engine.targets.cpu import Activations, CpuSection
from trimode.engine.targets.section import TargetSection
from trimode.engine.targets.tensorrt import TensorrtSection
from trimode.model.checkpoint import Checkpoint, linear_shapes
from trimode.model.config import CONFIG, GENERATION_CONFIG
from trimode.model.step import adapter_inputs
from trimode.model.tokenizer import Tokenizer, tokenizer_files

_EMBEDDING_TYPES: dict[np.dtype[np.generic], Real] = {
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(np.float16): "fp16",
    np.dtype(np.float32): "fp32",
}

FIRST_SM_IN_PLACE = 89


@dataclass(frozen=True)
class CpuOptions:
    """activations: ``int8`` rounds the inputs of int4 products to 8 bits: several times as fast on large matrices, and
    no longer w4a16.

    unpacked_bytes: with fp32 activations, int4 matrices that all together take no more than this as fp32 are stored so.
    ONNX Runtime unpacks int4 anew in every pass, and four bits save nothing where the weights stay in a cache.
    """

    activations: Activations = "fp32"
    unpacked_bytes: int = 16 << 20


@dataclass(frozen=True)
class RtxOptions:
    """sms: compute capabilities, 121 for 12.1. dtype: of activations and KV pool. max_batch, max_step: the largest
    batch, and the longest step of one, that a pass can have.
    """

    sms: tuple[int, ...] = (121, 120, 89)
    dtype: Literal["bf16", "fp16"] = "bf16"
    max_batch: int = 8
    max_step: int = 256


@dataclass(frozen=True)
class TensorrtOptions:
    """sms: compute capabilities to compile kernels for; this machine's GPU unless given, with ``emit_only`` all known.
    emit_only: leave the plans to ``trimode compile``. The others as in :class:`RtxOptions`.
    """

    sms: tuple[int, ...] | None = None
    dtype: Literal["bf16", "fp16"] = "bf16"
    max_batch: int = 8
    max_step: int = 256
    emit_only: bool = False


TargetOptions = CpuOptions | RtxOptions | TensorrtOptions
TARGET_OPTIONS: dict[str, type[TargetOptions]] = {"cpu": CpuOptions, "rtx": RtxOptions, "tensorrt": TensorrtOptions}


class _Built(NamedTuple):
    """What a target's build tells the manifest."""

    section: TargetSection
    pool: tuple[PoolEntry, ...]


def build_engine(
    checkpoint: Checkpoint,
    out: Path,
    *,
    target: TargetOptions = CpuOptions(),
    capacity: int | None = None,
    prefill_step: int = 256,
    top_k: int | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Build both engines into ``out`` for the target whose options are given.

    capacity: longest sequence in tokens (the model's own limit on a CPU, 4096 on a GPU, which holds all of it at once).
    prefill_step: tokens of a prefill pass. top_k: candidates that each row reports, hence the widest choice that
    sampling has; 64 on a CPU, 4 on a GPU, where they cross to the host.
    """
    config = checkpoint.config
    on_gpu = not isinstance(target, CpuOptions)
    limits = Limits(
        capacity=capacity or min(config.max_position_embeddings, 4096 if on_gpu else config.max_position_embeddings),
        prefill_step=prefill_step if isinstance(target, CpuOptions) else min(prefill_step, target.max_step),
        top_k=min(top_k or (4 if on_gpu else 64), config.vocab_size),
        max_batch=None if isinstance(target, CpuOptions) else target.max_batch,
        max_step=None if isinstance(target, CpuOptions) else target.max_step,
    )
    if limits.capacity > config.max_position_embeddings:
        raise TriModeError(
            f"capacity {limits.capacity} exceeds the model's max_position_embeddings {config.max_position_embeddings}"
        )
    Tokenizer.from_folder(checkpoint.folder)
    real: Real = "fp32" if isinstance(target, CpuOptions) else target.dtype
    with atomic_folder(out) as folder:
        built = _build_target(checkpoint, folder, limits, target, progress)
        adapter = _write_adapter(checkpoint, folder / ADAPTER)
        # The configs are for other servers, which read them beside the tokenizer; TriMode's runtime does not.
        for path in (*tokenizer_files(checkpoint.folder), PurePath(CONFIG), PurePath(GENERATION_CONFIG)):
            if (checkpoint.folder / path).exists():
                (folder / TOKENIZER / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.folder / path, folder / TOKENIZER / path)
        quantization = checkpoint.quantization
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            target=built.section,
            source=checkpoint.name,
            quantization="none" if quantization is None else quantization.quant_algo,
            model=config,
            precision=Precision(
                matrices={module: "int4" if checkpoint.is_int4(module) else real for module in linear_shapes(config)},
                embedding=_EMBEDDING_TYPES[checkpoint.vector("encoder.embed_tokens.weight").dtype],
                activations=real,
                kv_cache=real,
                group=None if quantization is None else quantization.group_size,
            ),
            limits=limits,
            adapter=adapter,
            parameters=checkpoint.parameters,
            tools={
                "trimode": __version__,
                "onnx": version("onnx"),
                "python": platform.python_version(),
            },
            pool=built.pool,
            files=hash_files(folder, progress),
        )
        manifest.write(folder)
    return Manifest.read(out)


def _unpacks(checkpoint: Checkpoint, target: TargetOptions) -> bool:
    """Whether the pool is to hold the checkpoint's int4 matrices as fp32."""
    if not isinstance(target, CpuOptions) or target.activations != "fp32":
        return False
    shapes = linear_shapes(checkpoint.config).items()
    weights = sum(rows * columns for module, (rows, columns) in shapes if checkpoint.is_int4(module))
    return 0 < weights * np.dtype(np.float32).itemsize <= target.unpacked_bytes


def _build_target(
    checkpoint: Checkpoint, folder: Path, limits: Limits, target: TargetOptions, progress: Progress
) -> _Built:
    adapter = checkpoint.adapter is not None
    if isinstance(target, CpuOptions):
        options = NetworkOptions(adapter=adapter)
        unpack = _unpacks(checkpoint, target)
        pool = build_cpu_engines(checkpoint, folder, options, target.activations, unpack, progress)
        section = CpuSection(
            instruction_set=instruction_set(),
            onnxruntime=onnxruntime.__version__,
            activations=target.activations,
            unpacked=unpack,
        )
        return _Built(section, pool)
    if isinstance(target, TensorrtOptions):
        return _build_tensorrt(checkpoint, folder, limits, target, progress)
    try:
        from trimode.build.rtx.engines import build_rtx_engines
    except ModuleNotFoundError as error:
        raise TriModeError(
            f"target rtx needs the package {error.name}: pip install 'trimode[rtx]' (x86-64 or aarch64 Linux)"
        ) from None
    options = NetworkOptions(
        top_k=limits.top_k,
        adapter=adapter,
        activations=target.dtype,
        capacity=limits.capacity,
        # The attention that TensorRT has for older GPUs takes no pool as it lies.
        kv_read="view" if min(target.sms) >= FIRST_SM_IN_PLACE else "window",
        rotate_together=True,
        select_by_product=True,
    )
    rtx, pool = build_rtx_engines(checkpoint, folder, options, target.sms, target.max_batch, target.max_step, progress)
    return _Built(rtx, pool)


def _build_tensorrt(
    checkpoint: Checkpoint, folder: Path, limits: Limits, target: TensorrtOptions, progress: Progress
) -> _Built:
    gpu = None if target.emit_only else require_tensorrt("or give --emit-only here and run `trimode compile` there")
    sms = target.sms or ((gpu.compute_capability,) if gpu else COMPUTE_CAPABILITIES)
    options = NetworkOptions(
        top_k=limits.top_k,
        adapter=checkpoint.adapter is not None,
        activations=target.dtype,
        capacity=limits.capacity,
        plugins=PluginOptions(splits=SPLITS, rank=checkpoint.adapter.config.r if checkpoint.adapter else 0),
    )
    plugins, pool = write_graphs(checkpoint, folder, options, sms, progress)
    section = TensorrtSection(sms=sms, plugins=plugins, plans=None)
    if gpu is not None:
        from trimode.build.tensorrt.plans import compile_plans

        section = section.model_copy(update={"plans": compile_plans(folder, section, limits, gpu, progress)})
    return _Built(section, pool)


def _write_adapter(checkpoint: Checkpoint, path: Path) -> AdapterEntry | None:
    """The adapter as the diffusion engine's inputs: transposed for ``x @ down @ up``, its scale folded into ``up``."""
    adapter = checkpoint.adapter
    if adapter is None:
        return None
    tensors: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    for index in range(checkpoint.config.num_hidden_layers):
        a, b = adapter.matrices(index)
        down, up = adapter_inputs(index)
        tensors[down] = np.ascontiguousarray(a.astype(np.float32).T)
        tensors[up] = np.ascontiguousarray(b.astype(np.float32).T * np.float32(adapter.config.scale))
    path.write_bytes(save(tensors))
    return AdapterEntry(rank=adapter.config.r, scale=adapter.config.scale)
