"""Target ``rtx``: TensorRT-RTX plans on a GPU. Only this package needs the extra ``[rtx]``, and only when it is used.

| module | what it is |
|---|---|
| ``cuda`` | the CUDA driver calls that are used: memory, one stream, graphs |
| ``plans`` | an engine directory's plans, deserialised, over one copy of their weights |
| ``device_kv_pool`` | the KV pool in the GPU's memory |
| ``passes`` | a pass of one shape: bound addresses, and the CUDA graph of it |
| ``executor`` | steps to passes: buckets, refusals |
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.runtime.gpu.fitting_gpu import fitting_gpu

if TYPE_CHECKING:
    from trimode.runtime.rtx.executor import RtxExecutor


def load_rtx_executor(engine: Path, manifest: Manifest) -> RtxExecutor:
    """Raises TriModeError if this machine has no GPU that the plans are for, lacks a package, or the plans are not
    whole.
    """
    ordinal = fitting_gpu(engine, manifest)
    try:
        from trimode.runtime.rtx.executor import RtxExecutor
    except ImportError as error:
        raise TriModeError(
            f"{engine} is for target rtx, which needs the package {error.name}: pip install 'trimode[rtx]'"
        ) from None
    return RtxExecutor(engine, manifest, ordinal)
