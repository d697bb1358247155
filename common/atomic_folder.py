"""An output folder that either is complete or does not exist."""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimode.common.errors import TriModeError


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``out``. Rename it to ``out`` when the body ends without an exception.

    After an exception, KeyboardInterrupt included, the temporary folder is removed. Raises TriModeError if ``out`` is
    not empty or cannot be created, or if the disk is full.
    """
    out = out.resolve()
    if out.is_mount():
        raise TriModeError(f"{out} is a mount point, which cannot be replaced; give a folder inside it")
    _refuse_occupied(out)
    temporary = _make_sibling(out)
    try:
        yield temporary
        _refuse_occupied(out)  # again: the body may have run for an hour
        temporary.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise TriModeError(
                f"{out}: the disk is full; nothing was kept. Free some space, or write elsewhere"
            ) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_occupied(out: Path) -> None:
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise TriModeError(f"{out} exists already; give another folder, or remove it first")


def _make_sibling(out: Path) -> Path:
    """A new folder in the parent of ``out``, so that renaming it is atomic."""
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise TriModeError(f"{out} cannot be written: {error.strerror}") from None
    return temporary
