"""``trimode convert``: an engine directory for another target with kernels of our own, without the checkpoint."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import onnx

from trimode.build.gpu.kernel_network import KernelNetwork
from trimode.build.gpu.kernel_target import KernelTarget
from trimode.build.graph.raw_pool import PoolRange, find_raw_pool
from trimode.common.atomic_folder import atomic_folder
from trimode.common.errors import TriModeError
from trimode.common.linked_file import link_file
from trimode.common.progress import Progress, no_progress
from trimode.engine.files import POOL, hash_files, verify_files
from trimode.engine.manifest import Manifest
from trimode.engine.targets.section import KernelSection
from trimode.model.step import ENGINES

# The graph that a weight's type and shape are read from. Every target with kernels of our own writes it.
_GRAPH = "ar/graph.onnx"


def convert_engine(source: Path, out: Path, target: KernelTarget, progress: Progress = no_progress) -> Manifest:
    """Write the engine directory ``source`` for ``target`` into the new folder ``out``, equal to what a build for it
    writes. Plans are not part of it: ``trimode compile`` adds them.

    Weight pool, kernels, adapter and tokenizer are hard links where the file system supports them. Raises TriModeError
    if ``source`` has no kernels of ours, was changed, or is of a type that the target does not take.
    """
    manifest = Manifest.read(source)
    section = manifest.target
    if not isinstance(section, KernelSection):
        raise TriModeError(
            f"{source} is for target {section.name}, which has no kernels of ours; build for {target.name} from the "
            f"checkpoint: trimode build CHECKPOINT {out} --target {target.name}"
        )
    if manifest.ranks > 1:
        raise TriModeError(
            f"{source} is divided among {manifest.ranks} ranks and cannot be converted; build for {target.name} from "
            f"the checkpoint: trimode build CHECKPOINT {out} --target {target.name}"
        )
    verify_files(source, manifest.files, progress)
    with atomic_folder(out) as folder:
        of_engines = {name for name, _ in ENGINES}
        linked = [entry for entry in manifest.files if PurePosixPath(entry.path).parts[0] not in of_engines]
        for entry in linked:
            link_file(source / entry.path, folder / entry.path)
        written = target.write_engines(_network(source, manifest), folder, section.sms, progress)
        files = hash_files(folder, progress, verified=linked)
        manifest.model_copy(update={"target": written, "files": files}).write(folder)
    return Manifest.read(out)


def _network(source: Path, manifest: Manifest) -> KernelNetwork:
    inputs = {value.name: value.type.tensor_type for value in onnx.load(source / _GRAPH).graph.input}
    ranges = {}
    for entry in manifest.pool:
        read = inputs[entry.name]
        shape = tuple(dim.dim_value for dim in read.shape.dim)
        ranges[entry.name] = PoolRange(entry.name, read.elem_type, shape, entry.offset, entry.bytes)
    precision = manifest.precision
    return KernelNetwork(
        config=manifest.model,
        pool=find_raw_pool(source / POOL, manifest.model, ranges, precision.group),
        rank=0 if manifest.adapter is None else manifest.adapter.rank,
        real=precision.activations,
        limits=manifest.limits,
    )
