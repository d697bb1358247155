"""Optimise the graphs of both engines with ONNX Runtime. They share one file of weights in the layout of its kernels.

ONNX Runtime optimises each graph offline and writes its constants, with their packed copies, to a separate file. Both
files hold the same constants. :mod:`trimode.build.cpu.prepacked_pool` merges them, and both sessions map the merged
file.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime as ort

from trimode.build.cpu.pieces import cut_at_sums
from trimode.build.cpu.prepacked_pool import data_file, merge_pools
from trimode.build.graph.network import NetworkOptions, build_network
from trimode.build.graph.raw_pool import Layout, write_raw_pool
from trimode.build.sharded_checkpoint import ShardedCheckpoint, sharded
from trimode.build.target import Built
from trimode.common.errors import TriModeError
from trimode.common.machine import instruction_set
from trimode.common.progress import Progress
from trimode.engine.files import POOL, rank_folder
from trimode.engine.manifest import PoolEntry
from trimode.engine.targets.cpu import Activations, CpuSection, model_files
from trimode.model.checkpoint import Checkpoint, linear_shapes
from trimode.model.step import ENGINES

# MatMulNBits computes in fp32 at level 1. At level 4 it rounds its input to 8 bits and is several times as fast.
_ACCURACY_LEVELS: dict[Activations, str] = {"fp32": "1", "int8": "4"}
# Smaller constants, shapes and scalars, stay in the graph.
POOLED_FROM_BYTES = 1024


def build_cpu_engines(
    checkpoint: Checkpoint, folder: Path, activations: Activations, unpacked_bytes: int, ranks: int, progress: Progress
) -> Built:
    """Write the graphs of ``ar/`` and ``diffusion/`` and the pool of each rank into ``folder``.

    activations, unpacked_bytes, ranks: as in :class:`trimode.build.cpu.target.CpuTarget`.
    """
    parts = sharded(checkpoint, ranks)
    int4_bytes = _fp32_bytes_of_int4(checkpoint)
    unpack = 0 < int4_bytes <= unpacked_bytes
    if int4_bytes <= unpacked_bytes:  # no product has int4 weights
        activations = "fp32"
    options = NetworkOptions(adapter=checkpoint.adapter is not None, ranks=ranks)
    pieces = 1 if ranks == 1 else 2 * checkpoint.config.num_hidden_layers + 1
    pools = []
    for rank, part in enumerate(parts):
        of_rank = folder / rank_folder(rank, ranks)
        of_rank.mkdir(exist_ok=True)
        pools.append(_build_rank(part, of_rank, activations, options, "dense" if unpack else "onnx", pieces, progress))
    if any(pool != pools[0] for pool in pools):
        raise RuntimeError("the weight pools of the ranks have different ranges")
    section = CpuSection(
        instruction_set=instruction_set(),
        onnxruntime=ort.__version__,
        activations=activations,
        unpacked=unpack,
        pieces=pieces,
    )
    return Built(section, pools[0], ranks)


def _build_rank(
    part: ShardedCheckpoint,
    folder: Path,
    activations: Activations,
    options: NetworkOptions,
    layout: Layout,
    pieces: int,
    progress: Progress,
) -> tuple[PoolEntry, ...]:
    """Write both engines of a rank, and the pool, whose ranges are returned."""
    engines: list[list[Path]] = []
    with TemporaryDirectory(dir=folder) as temporary:
        scratch = Path(temporary)
        raw = write_raw_pool(part, scratch / "raw.bin", progress, np.dtype(np.float32), layout)
        for index, (name, pattern) in enumerate(ENGINES):
            progress("graphs", index, len(ENGINES))
            (folder / name).mkdir()
            source = scratch / f"{name}.onnx"
            network = build_network(part.config, raw, pattern, options)
            onnx.save(network, source)
            onnx.checker.check_model(source)
            engines.append([folder / name / file for file in model_files(pieces)])
            for model, result in zip(cut_at_sums(network, pieces - 1), engines[-1], strict=True):
                onnx.save(model, source)
                _optimise(source, result, activations)
        progress("graphs", len(ENGINES), len(ENGINES))
    (folder / POOL).parent.mkdir()
    return merge_pools(engines, folder / POOL)


def _fp32_bytes_of_int4(checkpoint: Checkpoint) -> int:
    """Bytes that the checkpoint's int4 matrices take as fp32."""
    shapes = linear_shapes(checkpoint.config).items()
    weights = sum(rows * columns for module, (rows, columns) in shapes if checkpoint.is_int4(module))
    return weights * np.dtype(np.float32).itemsize


def _optimise(source: Path, result: Path, activations: Activations) -> None:
    options = ort.SessionOptions()
    # Hides the warning that the result depends on this machine; the manifest records the machine.
    options.log_severity_level = 3
    options.optimized_model_filepath = str(result)
    for key, value in {
        "session.optimized_model_external_initializers_file_name": data_file(result).name,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(POOLED_FROM_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
        "session.qdq_matmulnbits_accuracy_level": _ACCURACY_LEVELS[activations],
    }.items():
        options.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own unrelated exception types
        if re.search("No space left|Failed to (write|flush)", str(error)):
            raise TriModeError(f"{result.parent}: the disk is full; free space and build again") from None
        raise
