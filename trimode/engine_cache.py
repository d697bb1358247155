"""Engines built from checkpoints, kept in a cache folder: each content with each set of options is built once.

```
<cache>/<key>/engine/       the engine directory
<cache>/<key>/entry.json    what it was built from, and its size
<cache>/.<key>.lock         held while the entry is built or removed
<cache>/hashes.json         hashes of checkpoint files by path, size and modification time
```
An entry is complete or absent. The folder is :func:`trimode.common.cache_folder.cache_folder`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from trimode.common.atomic_folder import atomic_folder
from trimode.common.cache_folder import cache_folder
from trimode.common.errors import TriModeError
from trimode.common.extras import requires_extra
from trimode.common.machine import instruction_set
from trimode.common.progress import Progress, no_progress
from trimode.common.records import read_json_record
from trimode.common.version import __version__
from trimode.engine.files import MANIFEST, hash_file
from trimode.engine.manifest import FORMAT_VERSION
from trimode.model.checkpoint import ADAPTER_FOLDER, Checkpoint, is_hub_id, open_checkpoint
from trimode.model.quantization import Method

QUANTISER = "nvidia-modelopt"
ENGINE, RECORD, HASHES = "engine", "entry.json", "hashes.json"
# Top-level files of a checkpoint that quantisation or the build reads; and every file of the adapter's folder.
_READ = ("*.json", "*.jinja", "*.safetensors")
# A file that was modified this recently may change again without a new modification time, so its hash is not kept.
_SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class BuildOptions:
    """Options for building a checkpoint's engine, as in ``trimode quantize`` and ``trimode build``.

    target: ``cpu`` if None. method: if None, ``awq`` where the checkpoint folder has a ``calibration.jsonl``, else
    ``rtn``. group: if None, 128 or the largest smaller power of two that divides every matrix.
    """

    target: str | None = None
    method: Method | None = None
    group: int | None = None


class CacheEntry(BaseModel):
    """``entry.json``. method and group are None if the checkpoint was quantised already. ``bytes`` on disk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    source: str
    target: str
    method: Method | None
    group: PositiveInt | None
    bytes: NonNegativeInt


def engine_of(model: str | Path, options: BuildOptions, progress: Progress = no_progress) -> Path:
    """The engine directory of ``model``: an engine directory itself, a checkpoint folder, or a Hugging Face model ID.

    A checkpoint is quantised and built into the cache unless it is there already. If another process builds the same
    entry, wait for it. Raises TriModeError.
    """
    if (Path(model) / MANIFEST).is_file():
        given = [name for name, value in asdict(options).items() if value is not None]
        if given:
            raise TriModeError(f"{model} is an engine directory, which is built already; leave out {', '.join(given)}")
        return Path(model)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise TriModeError(f"{model} is not an engine directory or a checkpoint: no manifest.json, no config.json")
    if not Path(model).is_dir() and not is_hub_id(model):
        raise TriModeError(f"{model} is not an engine directory, a checkpoint folder or a Hugging Face model ID")
    return _built(open_checkpoint(model), options, progress)


def list_entries() -> list[CacheEntry]:
    """The complete entries of the cache, by key."""
    records = sorted(cache_folder().glob(f"[!.]*/{RECORD}"))
    return [read_json_record(CacheEntry, path) for path in records]


def remove_entry(key: str) -> CacheEntry:
    """Remove an entry, after a running build of it has ended. Raises TriModeError if there is no entry of that key."""
    folder = cache_folder()
    entry = next((entry for entry in list_entries() if entry.key == key), None)
    if entry is None:
        raise TriModeError(f"{folder} has no engine {key}; `trimode cache` lists them")
    with _locked(folder, key, no_progress):
        removed = folder / f".{key}.{secrets.token_hex(4)}"
        (folder / key).rename(removed)
        shutil.rmtree(removed)
    return entry


def _built(checkpoint: Checkpoint, options: BuildOptions, progress: Progress) -> Path:
    from trimode.build.registry import TARGETS

    target = options.target or "cpu"
    if target not in TARGETS:
        raise TriModeError(f"target {target} is unknown; give one of {', '.join(TARGETS)}")
    target_options = TARGETS[target]()
    try:
        target_options.import_packages()
        with requires_extra("build"):
            from trimode.build.engine_builder import build_engine
            from trimode.quantize import CALIBRATION_FILE, METHODS, fitting_group, quantize_checkpoint
    except TriModeError as error:
        raise TriModeError(f"{checkpoint.folder} is a checkpoint; building its engine failed: {error}") from None
    method, group = options.method, options.group
    if checkpoint.quantization is not None:
        if method is not None or group is not None:
            raise TriModeError(f"{checkpoint.folder} is quantised already; leave out method and group")
    else:
        method = method or ("awq" if (checkpoint.folder / CALIBRATION_FILE).is_file() else "rtn")
        group = group or fitting_group(checkpoint)
    folder = _make(cache_folder())
    files = _files_read(
        checkpoint.folder, [CALIBRATION_FILE] if method is not None and METHODS[method].calibrated else []
    )
    identity = {
        "source": checkpoint.name,
        "files": _hashes(folder, checkpoint.folder, files, progress),
        "target": target,
        "target_options": asdict(target_options),
        "method": method,
        "group": group,
        "format": FORMAT_VERSION,
        "versions": {"trimode": __version__} | {name: _version(name) for name in (*target_options.packages, QUANTISER)},
        "machine": instruction_set(),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    key = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', checkpoint.name).strip('.-')}-{target}-{digest[:16]}"
    if (folder / key / RECORD).is_file():
        return folder / key / ENGINE
    with _locked(folder, key, progress):
        if (folder / key / RECORD).is_file():
            return folder / key / ENGINE
        _remove_leftovers(folder, key)
        with atomic_folder(folder / key) as new:
            source = checkpoint
            if method is not None and group is not None:
                quantize_checkpoint(checkpoint, new / "w4a16", method=method, group=group, progress=progress)
                source = Checkpoint(new / "w4a16", checkpoint.name)
            build_engine(source, new / ENGINE, target=target_options, progress=progress)
            if source is not checkpoint:
                shutil.rmtree(new / "w4a16")
            size = sum(path.stat().st_size for path in (new / ENGINE).rglob("*") if path.is_file())
            entry = CacheEntry(key=key, source=checkpoint.name, target=target, method=method, group=group, bytes=size)
            (new / RECORD).write_text(entry.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return folder / key / ENGINE


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TriModeError(f"the cache {folder} cannot be made: {error.strerror}; set TRIMODE_CACHE") from None
    return folder


def _files_read(folder: Path, more: list[str]) -> list[Path]:
    found = {path for pattern in (*_READ, *more) for path in folder.glob(pattern) if path.is_file()}
    adapter = folder / ADAPTER_FOLDER
    return sorted(found | {path for path in adapter.rglob("*") if path.is_file()})


def _hashes(cache: Path, folder: Path, files: list[Path], progress: Progress) -> dict[str, str]:
    """The sha256 of each file, by its path below ``folder``. Unchanged files are not read again."""
    try:
        known: dict[str, Any] = json.loads((cache / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    found, fresh = {}, {}
    total, done = sum(path.stat().st_size for path in files), 0
    for path in files:
        real = path.resolve()
        status = real.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        remembered = known.get(str(real))
        if isinstance(remembered, list) and remembered[:3] == stamp:
            digest = str(remembered[3])
        else:
            digest = hash_file(real)
            if time.time() - status.st_mtime > _SETTLED_SECONDS:
                fresh[str(real)] = [*stamp, digest]
        found[path.relative_to(folder).as_posix()] = digest
        done += status.st_size
        progress("hash", done, total)
    if fresh:
        temporary = cache / f".{HASHES}.{secrets.token_hex(4)}"
        temporary.write_text(json.dumps(known | fresh), encoding="utf-8")
        temporary.replace(cache / HASHES)
    return found


@contextmanager
def _locked(folder: Path, key: str, progress: Progress) -> Iterator[None]:
    """Hold the entry's lock. The operating system releases it when the process ends, also after a crash."""
    with (folder / f".{key}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait", 0, 1)  # another process builds this entry
            fcntl.flock(file, fcntl.LOCK_EX)
            progress("wait", 1, 1)
        yield


def _remove_leftovers(folder: Path, key: str) -> None:
    """Remove what a killed process left of this entry."""
    for path in folder.glob(f".{key}.*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
