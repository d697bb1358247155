"""Imports that need an optional group of packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trimode.cli.interrupts import exit_on_interrupt
from trimode.common import extras


@contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Around imports: as :func:`trimode.common.extras.requires_extra`; Ctrl-C exits immediately."""
    with extras.requires_extra(extra), exit_on_interrupt():
        yield
