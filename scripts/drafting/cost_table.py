"""Seconds of a pass by engine, batch and step, for a machine: measured or estimated, kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from trimode.runtime.scheduling.pass_cost import EngineName, PassCost

BATCHES = (1, 2, 4, 8, 16, 32, 64)
STEPS = (1, 2, 4, 8, 16, 32, 64)


class CostTable:
    """name: of the machine. source: where the seconds are from. grid: of each engine, by batch and step (powers of
    two). Between its cells and beyond them, seconds are those of :class:`PassCost`.
    """

    def __init__(self, name: str, source: str, grid: dict[EngineName, list[list[float]]]) -> None:
        self.name = name
        self.source = source
        self.grid = grid
        self._known: dict[tuple[EngineName, int, int], float] = {}

    @classmethod
    def of(
        cls,
        name: str,
        source: str,
        seconds: Callable[[EngineName, int, int], float],
        batches: tuple[int, ...] = BATCHES,
    ) -> CostTable:
        grid: dict[EngineName, list[list[float]]] = {
            engine: [[seconds(engine, batch, step) for step in STEPS] for batch in batches]
            for engine in get_args(EngineName)
        }
        return cls(name, source, grid)

    @classmethod
    def read(cls, path: Path) -> CostTable:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        plain: dict[str, Any] = {"name": self.name, "source": self.source, "grid": self.grid}
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    def seconds(self, engine: EngineName, batch: int, step: int) -> float:
        key = engine, batch, step
        if key not in self._known:
            self._known[key] = self._passes.seconds(engine, batch, step)
        return self._known[key]

    @cached_property
    def _passes(self) -> PassCost:
        passes = PassCost(BATCHES[len(self.grid["ar"]) - 1], STEPS[-1])
        passes.measure(
            lambda engine, batch, step: self.grid[engine][batch.bit_length() - 1][step.bit_length() - 1], seconds=1e9
        )
        return passes
