"""Packages that only an extra of the installation brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trimode.common.errors import TriModeError


@contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Around imports: a missing package raises TriModeError that names the package and the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "trimode":
            raise
        raise TriModeError(f"the package {error.name} is not installed: pip install 'trimode[{extra}]'") from None
