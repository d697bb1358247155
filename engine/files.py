"""Files of an engine directory: their names, sizes, hashes and checks.

Each target names its own files in :mod:`trimode.engine.targets`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeInt

from trimode.common.errors import TriModeError
from trimode.common.progress import Progress, no_progress
from trimode.engine.kernel_library import KERNELS
from trimode.engine.record import Record
from trimode.model.tokenizer import is_tokenizer_file

MANIFEST = "manifest.json"
POOL = "weights/pool.bin"
ADAPTER = "weights/adapter.safetensors"
TOKENIZER = "tokenizer"
# Folders in which files are found by their names; elsewhere only files that the manifest lists are opened.
READ_BY_NAME = (TOKENIZER, KERNELS)

_CHUNK = 1 << 22


def rank_folder(rank: int, ranks: int) -> PurePosixPath:
    """The folder that holds the engines, the weights and the adapter of a rank, relative to the engine directory. A
    single rank has no folder of its own.
    """
    return PurePosixPath() if ranks == 1 else PurePosixPath(f"rank{rank}")


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or PurePosixPath(path).is_absolute():
        raise ValueError("the path leaves the engine directory")
    return path


class EngineFile(Record):
    """``path`` is relative to the engine directory, with forward slashes."""

    path: Annotated[str, AfterValidator(_inside)]
    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def hash_file(path: Path, advanced: Callable[[int], None] = lambda _bytes: None) -> str:
    """The sha256 in hex. ``advanced`` receives the number of bytes of each chunk read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advanced(len(chunk))
    return digest.hexdigest()


def hash_files(folder: Path, progress: Progress, verified: Sequence[EngineFile] = ()) -> tuple[EngineFile, ...]:
    """Size and hash of every file in the folder.

    verified: entries of files that were linked from another engine after :func:`verify_files`; these files are not read
    again.
    """
    known = {entry.path: entry for entry in verified}
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    unread = sum(path.stat().st_size for name, path in found.items() if name not in known)
    advanced = _byte_counter("hashes", unread, progress)
    return tuple(
        known.get(name) or EngineFile(path=name, bytes=path.stat().st_size, sha256=hash_file(path, advanced))
        for name, path in found.items()
    )


def verify_files(engine: Path, files: Sequence[EngineFile], progress: Progress = no_progress) -> None:
    """Check every file of the engine. Raises TriModeError that names the first one that differs from the build.

    Foreign files are ignored, such as a README or the leftovers of a download. A foreign file that would be read, such
    as a second chat template, is refused.
    """
    listed = {entry.path for entry in files}
    for path in sorted(path.relative_to(engine) for folder in READ_BY_NAME for path in (engine / folder).rglob("*")):
        if path.as_posix() not in listed and _is_read(path) and (engine / path).is_file():
            raise TriModeError(f"{engine / path} is not part of the engine; remove it, or {rebuild_remedy(engine)}")
    advanced = _byte_counter("verify", sum(entry.bytes for entry in files), progress)
    for entry in files:
        verify_file(engine, entry, advanced)


def _is_read(path: PurePath) -> bool:
    """Whether a file of a folder in ``READ_BY_NAME`` would be read."""
    folder, *rest = path.parts
    if folder == TOKENIZER:
        return is_tokenizer_file(PurePath(*rest))
    return rest[0].startswith("sm_")


def verify_file(engine: Path, entry: EngineFile, advanced: Callable[[int], None] = lambda _bytes: None) -> None:
    """Check one file of the engine. Raises TriModeError if it differs from the build."""
    remedy = rebuild_remedy(engine)
    path = engine / entry.path
    if not path.is_file():
        raise TriModeError(f"{path} is missing; {remedy}")
    if path.stat().st_size != entry.bytes:
        raise TriModeError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry.bytes}; {remedy}")
    if hash_file(path, advanced) != entry.sha256:
        raise TriModeError(f"{path} was changed after the build (sha256 differs from the manifest); {remedy}")


def rebuild_remedy(engine: Path) -> str:
    """The end of an error message about a damaged engine."""
    return f"build the engine again: trimode build CHECKPOINT {engine}"


def _byte_counter(stage: str, total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return advanced
