"""Checkpoint to engine directory: the engines, the adapter, the tokenizer and the manifest, whole or not at all."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import onnxruntime
from safetensors.numpy import save

from trimode.build.cpu import build_cpu_engines
from trimode.build.network import NetworkOptions
from trimode.model.atomic_folder import atomic_folder
from trimode.model.checkpoint import HEAD, Checkpoint
from trimode.model.errors import TriModeError
from trimode.model.machine import instruction_set
from trimode.model.manifest import (
    ADAPTER,
    FORMAT_VERSION,
    TOKENIZER,
    Activations,
    AdapterEntry,
    EngineFile,
    Limits,
    Manifest,
    Precision,
    hash_file,
)
from trimode.model.progress import Progress, no_progress
from trimode.model.step import adapter_inputs
from trimode.model.tokenizer import FILES, Tokenizer

Target = Literal["cpu"]

_EMBEDDING_TYPES: dict[np.dtype[np.generic], Literal["bf16", "fp16", "fp32"]] = {
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(np.float16): "fp16",
    np.dtype(np.float32): "fp32",
}


def build_engine(
    checkpoint: Checkpoint,
    out: Path,
    *,
    target: Target = "cpu",
    capacity: int | None = None,
    prefill_step: int = 256,
    top_k: int = 64,
    activations: Activations = "fp32",
    progress: Progress = no_progress,
) -> Manifest:
    """Build both engines into ``out``.

    capacity: longest sequence in tokens (the model's own limit unless told). prefill_step: tokens of a prefill pass.
    top_k: candidates that each row reports, hence the widest choice that sampling has. activations: ``int8`` rounds the
    inputs of int4 products to 8 bits: several times as fast on large matrices, and no longer w4a16.
    """
    config = checkpoint.config
    limits = Limits(
        capacity=capacity or config.max_position_embeddings,
        prefill_step=prefill_step,
        top_k=min(top_k, config.vocab_size),
    )
    if limits.capacity > config.max_position_embeddings:
        raise TriModeError(
            f"capacity {limits.capacity} exceeds the model's max_position_embeddings {config.max_position_embeddings}"
        )
    Tokenizer.from_folder(checkpoint.folder)
    with atomic_folder(out) as folder:
        options = NetworkOptions(top_k=limits.top_k, adapter=checkpoint.adapter is not None)
        pool = build_cpu_engines(checkpoint, folder, options, activations, progress)
        adapter = _write_adapter(checkpoint, folder / ADAPTER)
        (folder / TOKENIZER).mkdir()
        for name in FILES:
            if (checkpoint.folder / name).exists():
                shutil.copyfile(checkpoint.folder / name, folder / TOKENIZER / name)
        linear_is_int4 = checkpoint.is_int4("encoder.layers.0.self_attn.q_proj")
        quantization = checkpoint.quantization
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            target=target,
            source=checkpoint.folder.resolve().name,
            quantization="none" if quantization is None else quantization.quant_algo,
            model=config,
            precision=Precision(
                linear="int4" if linear_is_int4 else "fp32",
                head="int4" if checkpoint.is_int4(HEAD) else "fp32",
                embedding=_EMBEDDING_TYPES[checkpoint.vector("encoder.embed_tokens.weight").dtype],
                activations=activations if linear_is_int4 else "fp32",
                kv_cache="fp32",
                group=None if quantization is None else quantization.group_size,
            ),
            limits=limits,
            adapter=adapter,
            parameters=checkpoint.parameters,
            instruction_set=instruction_set(),
            onnxruntime=onnxruntime.__version__,
            tools={
                "trimode": version("trimode"),
                "onnx": version("onnx"),
                "python": platform.python_version(),
            },
            pool=pool,
            files=_hashed_files(folder, progress),
        )
        manifest.write(folder)
    return Manifest.read(out)


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


def _hashed_files(folder: Path, progress: Progress) -> tuple[EngineFile, ...]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    done = 0

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        progress("hashes", done, total)

    return tuple(
        EngineFile(
            path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=hash_file(path, advanced)
        )
        for path in paths
    )
