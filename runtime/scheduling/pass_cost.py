"""What a pass costs: seconds by engine, batch and step length, measured once and corrected by every pass that runs.

The table has a cell for each power of two of batch and step. Between cells the logarithm of the seconds is interpolated
in the logarithms of batch and step, so a cost that is flat while memory-bound and grows in proportion when
compute-bound is met at both ends. A pass that took other than foretold says two things: how fast passes run now, with
other work on the machine and longer contexts than before, which goes for all cells alike; and that the cells around it
were wrong beside the others. Most of the difference is taken for the former, so cells that no pass has met for a while
stay comparable with those that just ran.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

EngineName = Literal["ar", "diffusion"]

_PACE_WEIGHT = 0.1  # of what a pass took, in the cost of all passes
_CELL_WEIGHT = 0.02  # and besides in the cells around it
_TRIALS = 3  # of a measured pass; the fastest counts
_OUTLIER = math.log(4)  # a pass that many times off its cost was disturbed; it counts as this
# Before anything was measured: a pass costs as much as so many of its tokens.
_TOKENS_OF_AN_EMPTY_PASS = 64


class _Place(NamedTuple):
    """Where a pass lies. log_beyond: of how far it is larger than the table. cells: around it, by row and column, each
    with its weight.
    """

    log_beyond: float
    cells: list[tuple[int, int, float]]


class PassCost:
    """Seconds of a pass. max_batch, max_step: how far the table goes; what is larger costs in proportion."""

    def __init__(self, max_batch: int, max_step: int) -> None:
        self._largest = max_batch, max_step
        self._batches = _powers(max_batch)
        self._steps = _powers(max_step)
        self._log_seconds: dict[EngineName, list[list[float]]] = {
            engine: [
                [math.log((_TOKENS_OF_AN_EMPTY_PASS + batch * step) * 1e-5) for step in self._steps]
                for batch in self._batches
            ]
            for engine in get_args(EngineName)
        }
        self._log_pace = 0.0  # of how much longer passes take now than their cells say
        self._places: dict[tuple[int, int], _Place] = {}

    def seconds(self, engine: EngineName, batch: int, step: int) -> float:
        return math.exp(self._log_of(engine, batch, step))

    def observe(self, engine: EngineName, batch: int, step: int, seconds: float) -> None:
        """A pass took so many seconds."""
        off = math.log(seconds) - self._log_of(engine, batch, step)
        off = min(max(off, -_OUTLIER), _OUTLIER)
        self._log_pace += _PACE_WEIGHT * off
        for row, column, weight in self._around(batch, step).cells:
            self._log_seconds[engine][row][column] += _CELL_WEIGHT * weight * off

    def measure(
        self,
        run: Callable[[EngineName, int, int], float],
        seconds: float,
        possible: Callable[[int, int], bool] = lambda _batch, _step: True,
    ) -> None:
        """Fill the table by running passes, smallest first, for about ``seconds`` in all.

        ``run`` makes one pass of that batch and step and returns its seconds. A cell that the time does not reach, or
        whose pass is not possible, costs what the largest one measured does, in proportion to its tokens; the passes
        to come correct it.
        """
        cells = [(b, s) for b in range(len(self._batches)) for s in range(len(self._steps))]
        cells.sort(key=self._tokens)
        for engine, table in self._log_seconds.items():
            deadline = time.perf_counter() + seconds / len(self._log_seconds)
            largest = cells[0]
            for cell in cells:
                row, column = cell
                batch, step = min(self._batches[row], self._largest[0]), min(self._steps[column], self._largest[1])
                if cell == cells[0] or (time.perf_counter() < deadline and possible(batch, step)):
                    table[row][column] = math.log(min(run(engine, batch, step) for _ in range(_TRIALS)))
                    largest = cell
                else:
                    more = self._tokens(cell) / self._tokens(largest)
                    table[row][column] = table[largest[0]][largest[1]] + math.log(more)
        self._log_pace = 0.0

    def _tokens(self, cell: tuple[int, int]) -> int:
        return self._batches[cell[0]] * self._steps[cell[1]]

    def _log_of(self, engine: EngineName, batch: int, step: int) -> float:
        table, (total, cells) = self._log_seconds[engine], self._around(batch, step)
        for row, column, weight in cells:
            total += weight * table[row][column]
        return total + self._log_pace

    def _around(self, batch: int, step: int) -> _Place:
        if (batch, step) not in self._places:
            beyond = max(1, batch / self._batches[-1]) * max(1, step / self._steps[-1])
            cells = [
                (row, column, down * right)
                for row, down in _neighbours(self._batches, min(batch, self._batches[-1]))
                for column, right in _neighbours(self._steps, min(step, self._steps[-1]))
            ]
            self._places[batch, step] = _Place(math.log(beyond), cells)
        return self._places[batch, step]


def _powers(largest: int) -> list[int]:
    """1, 2, 4, ... up to and with the first that is not below ``largest``."""
    return [1 << exponent for exponent in range(math.ceil(math.log2(largest)) + 1)]


def _neighbours(powers: list[int], value: int) -> list[tuple[int, float]]:
    """The powers of two below and above ``value``, by index, each with its weight by logarithms."""
    index = value.bit_length() - 1
    if value == powers[index]:
        return [(index, 1.0)]
    above = math.log2(value / powers[index])
    return [(index, 1 - above), (index + 1, above)]
