"""What is installed on this machine, as far as targets depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from trimode.common.gpus import Gpus


class Installation(NamedTuple):
    """packages: of all targets, the version by distribution name, None if it is not installed."""

    packages: Mapping[str, str | None]
    gpus: Gpus

    def has(self, *packages: str) -> bool:
        """Of packages that a target lists as its own."""
        return all(self.packages[package] is not None for package in packages)
