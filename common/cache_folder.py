"""The folder of everything that TriMode keeps between processes and that may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$TRIMODE_CACHE``, else ``$XDG_CACHE_HOME/trimode``, else ``~/.cache/trimode``. It may not exist yet."""
    if explicit := os.environ.get("TRIMODE_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "trimode"


def tactics_folder() -> Path:
    """The files of tactics that target cuda has timed, one for each GPU, driver and set of kernels."""
    return cache_folder() / "tactics"
