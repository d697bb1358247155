"""Checkpoint to engine directory: both engines, the adapter, the tokenizer and the manifest."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import version
from pathlib import Path, PurePath

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from trimode.build.cpu.target import CpuTarget
from trimode.build.sharded_checkpoint import sharded
from trimode.build.target import BuildTarget, Built, RequestedLimits
from trimode.common.atomic_folder import atomic_folder
from trimode.common.errors import TriModeError
from trimode.common.progress import Progress, no_progress
from trimode.common.version import __version__
from trimode.engine.files import ADAPTER, TOKENIZER, hash_files, rank_folder
from trimode.engine.manifest import FORMAT_VERSION, AdapterEntry, Manifest
from trimode.engine.precision import Precision, Real
from trimode.model.checkpoint import Checkpoint, linear_shapes
from trimode.model.config import GENERATION_CONFIG
from trimode.model.step import adapter_inputs
from trimode.model.tokenizer import Tokenizer, tokenizer_files

_EMBEDDING_TYPES: dict[np.dtype[np.generic], Real] = {
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(np.float16): "fp16",
    np.dtype(np.float32): "fp32",
}
DEFAULT_TARGET = CpuTarget()


def build_engine(
    checkpoint: Checkpoint,
    out: Path,
    *,
    target: BuildTarget = DEFAULT_TARGET,
    capacity: int | None = None,
    prefill_step: int = 256,
    top_k: int | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Build both engines for ``target`` into the new folder ``out``. If the build fails, ``out`` is not created.

    capacity: tokens of the longest sequence; None for the target's default. prefill_step: tokens of a prefill pass.
    top_k: candidates that the engine returns for each row, among which sampling chooses; None for the target's default.
    """
    target.import_packages()
    config = checkpoint.config
    limits = target.limits(config, RequestedLimits(capacity, prefill_step, top_k))
    if limits.capacity > config.max_position_embeddings:
        raise TriModeError(
            f"capacity {limits.capacity} exceeds the model's max_position_embeddings {config.max_position_embeddings}"
        )
    Tokenizer.from_folder(checkpoint.folder)
    with atomic_folder(out) as folder:
        built = target.build(checkpoint, folder, limits, progress)
        adapter = _write_adapter(checkpoint, folder, built)
        # Other servers read end tokens from the generation config; TriMode's runtime reads them from the manifest.
        for path in (*tokenizer_files(checkpoint.folder), PurePath(GENERATION_CONFIG)):
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
            precision=_precision(checkpoint, target.dtype),
            limits=limits,
            ranks=built.ranks,
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


def _precision(checkpoint: Checkpoint, real: Real) -> Precision:
    quantization = checkpoint.quantization
    return Precision(
        matrices={
            module: "int4" if checkpoint.is_int4(module) else real for module in linear_shapes(checkpoint.config)
        },
        embedding=_EMBEDDING_TYPES[checkpoint.vector("encoder.embed_tokens.weight").dtype],
        activations=real,
        kv_cache=real,
        group=None if quantization is None else quantization.group_size,
    )


def _write_adapter(checkpoint: Checkpoint, folder: Path, built: Built) -> AdapterEntry | None:
    """Each rank's part of the adapter, as inputs of the diffusion engine."""
    adapter = checkpoint.adapter
    if adapter is None:
        return None
    for rank, part in enumerate(sharded(checkpoint, built.ranks)):
        tensors: dict[str, NDArray[np.float32]] = {}
        for index in range(checkpoint.config.num_hidden_layers):
            matrices = part.adapter_matrices(index, scaled_input=built.scales_attention)
            tensors |= zip(adapter_inputs(index), matrices, strict=True)
        (folder / rank_folder(rank, built.ranks) / ADAPTER).write_bytes(save(tensors))
    return AdapterEntry(rank=adapter.config.r, scale=adapter.config.scale)
