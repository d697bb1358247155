"""The interface between the runtime and a target.

:data:`trimode.runtime.loading.TARGETS` lists the targets by name. The module of a target imports packages that are not
part of the base installation when it loads an engine, not before.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from trimode.common.installation import Installation
from trimode.engine.manifest import Manifest
from trimode.runtime.executor import Executor


class HostLimits(NamedTuple):
    """What an executor may use of the host, for targets that run there.

    threads: of a pass; None for all that the process may use. kv_cache_bytes: the KV pool may grow to this size; None
    for no limit. A GPU target's build fixes the size of its KV pool.
    """

    threads: int | None = None
    kv_cache_bytes: int | None = None


class RuntimeTarget(Protocol):
    """packages: distributions that it imports, alternatives included."""

    packages: tuple[str, ...]

    def load_executor(self, engine: Path, manifest: Manifest, limits: HostLimits) -> Executor:
        """Load both engines. Raises TriModeError if they cannot run on this machine."""
        ...

    def can_run(self, installation: Installation) -> str:
        """``runs``, or ``does not run: `` and the reason or remedy."""
        ...
