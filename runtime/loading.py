"""Loading of an engine directory: checked files, the tokenizer, and the executor of the engine's target."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from trimode.common.progress import Progress, no_progress
from trimode.engine.files import TOKENIZER, verify_files
from trimode.engine.manifest import Manifest
from trimode.engine.targets import NAMES
from trimode.model.tokenizer import Tokenizer
from trimode.runtime.executor import Executor
from trimode.runtime.kv.default_budget import default_kv_bytes
from trimode.runtime.target import HostLimits, RuntimeTarget

TARGETS: dict[str, RuntimeTarget] = {name: import_module(f"trimode.runtime.{name}.target").TARGET for name in NAMES}


class LoadedEngine(NamedTuple):
    """An engine directory, ready to run. Both of its engines write one KV pool, so one thread runs the executor."""

    manifest: Manifest
    tokenizer: Tokenizer
    executor: Executor


def load_engine(
    folder: Path,
    *,
    threads: int | None = None,
    kv_cache_bytes: int | None = None,
    verify: bool = True,
    progress: Progress = no_progress,
) -> LoadedEngine:
    """Load the engine directory ``folder``. With ``verify``, first check every file against the manifest.

    threads: as in :class:`trimode.runtime.target.HostLimits`. kv_cache_bytes: the most memory of target cpu's KV pool;
    by default, that of :func:`trimode.runtime.kv.default_budget.default_kv_bytes`. Raises TriModeError if the directory
    is damaged or cannot run on this machine.
    """
    manifest = Manifest.read(folder)
    if verify:
        verify_files(folder, manifest.files, progress)
    tokenizer = Tokenizer.from_folder(folder / TOKENIZER)
    if kv_cache_bytes is None:
        kv_cache_bytes = default_kv_bytes(sum(entry.bytes for entry in manifest.files))
    executor = TARGETS[manifest.target.name].load_executor(folder, manifest, HostLimits(threads, kv_cache_bytes))
    return LoadedEngine(manifest, tokenizer, executor)
