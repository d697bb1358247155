"""An output folder that is either whole or not there."""

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
    """Yield a temporary folder beside ``out``, and rename it to ``out`` when the body has ended well.

    After an exception, KeyboardInterrupt included, nothing is left of it. Raises TriModeError if ``out`` holds anything
    already, cannot be made, or the disk is full.
    """
    out = out.resolve()
    if out.is_mount():
        raise TriModeError(f"{out} is a mount point and cannot be put in place at once; give a folder inside it")
    _refuse_occupied(out)
    temporary = _make_sibling(out)
    try:
        yield temporary
        _refuse_occupied(out)  # once more: the work may have taken an hour
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
    """A new folder on the same file system, so that renaming it is one step."""
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise TriModeError(f"{out} cannot be written: {error.strerror}") from None
    return temporary
