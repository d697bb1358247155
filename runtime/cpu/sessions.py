"""ONNX Runtime sessions over the mapped weight pool of an engine, or of one rank of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import onnxruntime as ort

from trimode.common.errors import TriModeError
from trimode.common.machine import instruction_set
from trimode.engine.files import POOL
from trimode.engine.manifest import Manifest
from trimode.engine.targets.cpu import CpuSection


def refuse_foreign_layout(engine: Path, manifest: Manifest) -> None:
    """Refuse an engine whose packed weights are for another version of ONNX Runtime or another instruction set."""
    remedy = f"build it again here: trimode build CHECKPOINT {engine}"
    section = manifest.section(CpuSection)
    if section.onnxruntime != ort.__version__:
        raise TriModeError(
            f"{engine} was built with onnxruntime {section.onnxruntime}, this is {ort.__version__}; {remedy}"
        )
    if section.instruction_set != instruction_set():
        raise TriModeError(
            f"{engine} was built for another processor ({section.instruction_set}; this is {instruction_set()}); "
            f"{remedy}"
        )


@contextmanager
def folder_of_pool(engine: Path) -> Iterator[Path]:
    """The folder from which ONNX Runtime maps the pool while a session is created.

    ONNX Runtime refuses a file that is a symlink to another folder, as in a hub cache. For such a file, the folder is a
    temporary one next to the file, with a hard link to it.
    """
    pool = engine / POOL
    file = pool.resolve()
    if file == pool.parent.resolve() / pool.name:
        yield pool.parent
        return
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".trimode-", dir=file.parent)))
            os.link(file, folder / pool.name)
        except OSError as error:
            raise TriModeError(
                f"{pool} is a symlink, and {file.parent} cannot be written ({error.strerror}); load a copy of the "
                f"engine without symlinks: cp -rL {engine} COPY"
            ) from None
        yield folder


def load_session(path: Path, weights: Path, threads: int) -> ort.InferenceSession:
    """Load a graph that the build has optimised. weights: the folder of its pool, from :func:`folder_of_pool`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    # Threads spin within a pass, which is faster, but stop at its end, since the next pass may be the other engine's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    try:
        return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own unrelated exception types
        raise TriModeError(f"{path} cannot be loaded by onnxruntime: {str(error).splitlines()[0]}") from None
