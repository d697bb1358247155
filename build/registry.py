"""The targets that ``trimode build`` can build for, by the convention of :mod:`trimode.engine.targets`."""

from __future__ import annotations

from importlib import import_module

from trimode.build.target import BuildTarget
from trimode.engine.targets import NAMES

TARGETS: dict[str, type[BuildTarget]] = {name: import_module(f"trimode.build.{name}.target").TARGET for name in NAMES}
