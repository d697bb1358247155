"""An engine directory, loaded: checked files, tokenizer, and the executor of its target."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from trimode.common.progress import Progress, no_progress
from trimode.engine.files import TOKENIZER, verify_files
from trimode.engine.manifest import Manifest
from trimode.model.tokenizer import Tokenizer
from trimode.runtime.executor import Executor
from trimode.runtime.loading import load_executor


class Engine(NamedTuple):
    """What the scheduler runs on. Both engines write one KV pool, so the executor serves one thread."""

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
) -> Engine:
    """Every file is checked against the manifest first, unless ``verify`` is off.

    threads: of the cpu target, all the process may use unless told. kv_cache_bytes: that its KV pool may grow to.
    """
    manifest = Manifest.read(folder)
    if verify:
        verify_files(folder, manifest.files, progress)
    tokenizer = Tokenizer.from_folder(folder / TOKENIZER)
    return Engine(manifest, tokenizer, load_executor(folder, manifest, threads, kv_cache_bytes))
