"""Target ``cpu``: both graphs optimised for ONNX Runtime, over one file of kernel-ready weights.

ONNX Runtime optimises each graph offline and writes its constants with their packed copies to a file of its own. The two
files are the same byte for byte, because the two graphs' constants are; that is checked, and one is kept. Both sessions
then map the same pages.
"""

from __future__ import annotations

import filecmp
from pathlib import Path

import onnx
import onnxruntime as ort

from trimode.build.network import NetworkOptions, build_network
from trimode.build.raw_pool import Progress, write_raw_pool
from trimode.model.checkpoint import Checkpoint
from trimode.model.errors import TriModeError
from trimode.model.manifest import POOL, PoolEntry
from trimode.model.step import AttentionPattern

ENGINES: tuple[tuple[str, AttentionPattern], ...] = (("ar", "causal"), ("diffusion", "bidirectional"))
# Constants below this stay in the graph: shapes and scalars.
POOLED_FROM_BYTES = 1024


def build_cpu_engines(
    checkpoint: Checkpoint, folder: Path, options: NetworkOptions, progress: Progress
) -> tuple[PoolEntry, ...]:
    """Write ``ar/model.onnx``, ``diffusion/model.onnx`` and the pool into ``folder``; returns the pool's ranges."""
    scratch = folder / "scratch"
    scratch.mkdir()
    raw = write_raw_pool(checkpoint, scratch / "raw.bin", progress)
    pool_name = Path(POOL).name
    pools = []
    for index, (name, pattern) in enumerate(ENGINES):
        progress("graphs", index, len(ENGINES))
        source = scratch / f"{name}.onnx"
        onnx.save(build_network(checkpoint.config, raw, pattern, options), source)
        onnx.checker.check_model(source)
        optimised = scratch / name
        optimised.mkdir()
        _optimise(source, optimised / "model.onnx", pool_name)
        pools.append(optimised / pool_name)
    progress("graphs", len(ENGINES), len(ENGINES))
    raw.path.unlink()
    if not filecmp.cmp(*pools, shallow=False):
        raise AssertionError("the AR and diffusion graphs' constants differ")
    (folder / POOL).parent.mkdir()
    pools[0].rename(folder / POOL)
    pools[1].unlink()
    entries = [_pool_entries(scratch / name / "model.onnx") for name, _ in ENGINES]
    if entries[0] != entries[1]:
        raise AssertionError("the AR and diffusion graphs name different ranges of the pool")
    for name, _ in ENGINES:
        (folder / name).mkdir()
        (scratch / name / "model.onnx").rename(folder / name / "model.onnx")
        (scratch / name).rmdir()
        (scratch / f"{name}.onnx").unlink()
    scratch.rmdir()
    return entries[0]


def _optimise(source: Path, result: Path, pool_name: str) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # the warning that the result is for this machine only: the manifest says so
    options.optimized_model_filepath = str(result)
    for key, value in {
        "session.optimized_model_external_initializers_file_name": pool_name,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(POOLED_FROM_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
        # Level 4: int8 activations inside the int4 product, the fast kernels.
        "session.qdq_matmulnbits_accuracy_level": "4",
    }.items():
        options.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own unrelated exception types
        if "No space left" in str(error) or "ENOSPC" in str(error):
            raise TriModeError(f"{result.parent}: the disk is full; free space and build again") from None
        raise


def _pool_entries(model: Path) -> tuple[PoolEntry, ...]:
    entries = []
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = {item.key: item.value for item in tensor.external_data}
        packed = [value.split("|", 1)[1] for key, value in where.items() if key.startswith("prepacked_")]
        # "key|offset;length;checksum", more than one blob joined by "|".
        blobs = [tuple(map(int, blob.split(";")[:2])) for value in packed for blob in value.split("|")]
        entries.append(
            PoolEntry(
                name=tensor.name,
                offset=int(where["offset"]),
                bytes=int(where["length"]),
                packed_offset=blobs[0][0] if blobs else None,
                packed_bytes=sum(length for _, length in blobs),
            )
        )
    return tuple(sorted(entries, key=lambda entry: entry.offset))
