"""Silence for libraries that print."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from trimode.common.progress import Progress


@contextmanager
def quiet(progress: Progress) -> Iterator[Progress]:
    """Suppress prints, progress bars, warnings and logs below ERROR. The progress that it yields is still shown."""
    stdout, stderr, disabled = sys.stdout, sys.stderr, logging.root.manager.disable

    def shown(stage: str, done: int, total: int) -> None:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            progress(stage, done, total)

    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield shown
        finally:
            logging.disable(disabled)
