"""``trimode compile``: the second step of target ``tensorrt``, on the machine with the GPU."""

from __future__ import annotations

from pathlib import Path

from trimode.common.atomic_folder import atomic_folder
from trimode.common.errors import TriModeError
from trimode.common.gpus import Gpu, find_gpus
from trimode.common.linked_file import link_file
from trimode.common.progress import Progress, no_progress
from trimode.engine.files import hash_files, verify_files
from trimode.engine.manifest import Manifest
from trimode.engine.targets.tensorrt import TensorrtSection


def compile_engine(emitted: Path, out: Path, progress: Progress = no_progress) -> Manifest:
    """Compile the plans of ``emitted``, which ``trimode build --target tensorrt --emit-only`` wrote, into the new
    folder ``out``.

    Files that do not change are hard links where the file system supports them. Raises TriModeError if ``emitted`` is
    another kind of folder or was changed, or if this machine lacks TensorRT, a GPU, or kernels for its GPU.
    """
    manifest = Manifest.read(emitted)
    section = manifest.target
    if not isinstance(section, TensorrtSection):
        raise TriModeError(
            f"{emitted} is for target {section.name}, which has no second step; give an engine that "
            "`trimode build --target tensorrt --emit-only` wrote"
        )
    if section.plans is not None:
        raise TriModeError(f"{emitted} was compiled already, on {section.plans.gpu}")
    gpu = require_tensorrt("run this on the machine with the GPU")
    verify_files(emitted, manifest.files, progress)
    with atomic_folder(out) as folder:
        for entry in manifest.files:
            link_file(emitted / entry.path, folder / entry.path)
        from trimode.build.tensorrt.plan_compilation import compile_plans

        plans = compile_plans(folder, section, manifest.limits, gpu, progress)
        compiled = section.model_copy(update={"plans": plans})
        files = hash_files(folder, progress, verified=manifest.files)
        manifest.model_copy(update={"target": compiled, "files": files}).write(folder)
    return Manifest.read(out)


def require_tensorrt(remedy: str) -> Gpu:
    """The GPU that TensorRT will build for. Raises TriModeError that lists everything missing, and ``remedy``."""
    missing = []
    try:
        import tensorrt  # noqa: F401
    except (ImportError, OSError) as error:
        missing.append(f"the package tensorrt ({str(error).splitlines()[0]}; pip install 'trimode[tensorrt]')")
    gpus = find_gpus()
    if not gpus.found:
        missing.append(f"an NVIDIA GPU (driver: {gpus.driver})")
    if missing:
        raise TriModeError(f"compiling for target tensorrt needs {' and '.join(missing)}; {remedy}")
    return gpus.found[0]
