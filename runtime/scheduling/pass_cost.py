"""What a pass costs: seconds by engine, batch and step length, learnt from every pass that runs.

The table has a cell for each power of two of batch and step; between cells, the logarithm of the seconds is
interpolated in the logarithms of batch and step. A pass costs its cells' seconds times the *pace*, which is common to
all passes: other work on the machine and longer contexts slow all of them down alike.

Other work delays single passes at random. So a pass that is slower than expected counts in full only if the cell was in
doubt, or if the pass before it was slow too.

Every cell has a *doubt*, its expected error as a logarithm; so has the pace. An observed pass moves the cells and the
pace in proportion to the squares of their doubts (a Kalman filter without correlations), and the remaining error is the
new doubt. The doubt of a cell grows with every pass that does not meet it. :meth:`PassCost.least_seconds`, the cost
less its doubt, is what blocks are tried by: a choice that looks bad is tried again once its doubt exceeds the gap, so a
wrong cell is always found out. Each time a retried cell proves right, its doubt grows more slowly, so retries become
rare. Choices by cost never change which tokens are emitted.

Passes keep their proportions while the machine becomes slower or faster. So a *known* cell moves no more than the pace,
however long ago it was met, if its pass is no surprise: otherwise the first pass after a slow period would be taken for
a faster cell, and all others would seem slow for long.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

EngineName = Literal["ar", "diffusion"]

_TRIALS = 3  # that a measured pass takes at least, and after which it is known if none was faster
_FASTER = 0.98  # factor of the seconds of a trial that is faster than those before it
_TOKENS_OF_AN_EMPTY_PASS = 64  # first guess: a pass costs as much as this many of its tokens
_OUTLIER = math.log(4)  # a larger error of one pass counts as this
_CREDIBLE_DELAY = 0.3  # error that a single slow pass counts as, if its cell was not in doubt

_NOISE = 0.4  # expected error of one observation
_FIRST_PACE_DOUBT = math.log(4)
_LEAST_PACE_DOUBT = 0.3
_GUESSED_DOUBT = math.log(8)
_LEAST_CELL_DOUBT = 0.2
_MOST_KNOWN_DOUBT = 0.3  # that counts of a known cell, if its pass is no surprise
_MOST_DOUBT = math.log(1000)
_GROWTH = math.log(2) / 4  # of a guessed cell's doubt, for each pass elsewhere
_MEASURED_GROWTH = _GROWTH / 4  # of a measured one's
_SLOWER_GROWTH = 1 / 4  # factor after an observation that confirms the cell
_LEAST_GROWTH = _GROWTH / 256
_CONFIRMED = math.log(1.5)  # largest error of an observation that confirms a cell
SURPRISE = math.log(2)  # least error after which a cell's doubt grows fast again


@dataclass(slots=True)
class _Cell:
    """log_seconds: at pace 1. doubt: when last met. growth: of the doubt for each pass since. met_at: pass number.
    error: of the last pass.
    """

    log_seconds: float
    doubt: float = _GUESSED_DOUBT
    growth: float = _GROWTH
    met_at: int = 0
    error: float = 0.0

    @property
    def known(self) -> bool:
        """Whether it was measured or confirmed, and has not been surprising since."""
        return self.growth <= _MEASURED_GROWTH


class _Place(NamedTuple):
    """Where a pass lies. log_beyond: logarithm of the factor by which it exceeds the table. cells: those around it, by
    row and column, each with its weight; the nearest comes first.
    """

    log_beyond: float
    cells: list[tuple[int, int, float]]


class PassSeconds(NamedTuple):
    """Sums over the passes observed: the seconds that they were expected to take, and that they took."""

    expected: float
    seconds: float


class PassCost:
    """Seconds of a pass. max_batch, max_step: the table's largest pass; larger passes cost in proportion to it."""

    def __init__(self, max_batch: int, max_step: int) -> None:
        self._largest = max_batch, max_step
        self._batches = _powers(max_batch)
        self._steps = _powers(max_step)
        self._cells: dict[EngineName, list[list[_Cell]]] = {
            engine: [
                [_Cell(math.log((_TOKENS_OF_AN_EMPTY_PASS + batch * step) * 1e-5)) for step in self._steps]
                for batch in self._batches
            ]
            for engine in get_args(EngineName)
        }
        self._log_pace = 0.0
        self._pace_doubt = _FIRST_PACE_DOUBT
        self.surprises = 0  # passes whose time shows that others may have changed, too
        self._passes = 0  # observed so far
        self._observed = {engine: [0.0, 0.0] for engine in get_args(EngineName)}  # sums, as PassSeconds
        self._places: dict[tuple[int, int], _Place] = {}
        self._least: dict[tuple[EngineName, int], list[float]] = {}  # by row, after ``_least_at`` passes
        self._least_at = 0

    def seconds(self, engine: EngineName, batch: int, step: int) -> float:
        """The expected seconds of a pass."""
        return math.exp(self._log_seconds(engine, self._place(batch, step)))

    def least_seconds(self, engine: EngineName, batch: int, step: int) -> float:
        """The fewest seconds that the pass may take, given how long ago such a pass ran."""
        place = self._place(batch, step)
        total = place.log_beyond + self._log_pace
        for row, column, weight in place.cells:
            total += weight * self._least_of_row(engine, row)[column]
        return math.exp(total)

    def observe(self, engine: EngineName, batch: int, step: int, seconds: float) -> None:
        """A pass took so many seconds."""
        place, cells = self._place(batch, step), self._cells[engine]
        expected = self._log_seconds(engine, place)
        error = math.log(seconds) - expected
        sums = self._observed[engine]
        sums[0] += math.exp(expected)
        sums[1] += seconds
        met = [(cells[row][column], weight) for row, column, weight in place.cells]
        doubts = [self._doubt(cell) for cell, _ in met]
        nearest, most_doubt = met[0][0], max(doubts)
        credible = max(_OUTLIER, most_doubt)  # one pass may have been disturbed
        credible_delay = min(credible, max(nearest.error, most_doubt, _CREDIBLE_DELAY))
        counted = max(min(error, credible_delay), -credible)
        nearest.error = error
        gains: list[float] = []  # of the cells, before division by ``total``
        for (cell, weight), doubt in zip(met, doubts, strict=True):
            most = _MOST_KNOWN_DOUBT if cell.known and abs(counted) <= SURPRISE else doubt
            gains.append(weight * max(min(doubt, most), _LEAST_CELL_DOUBT) ** 2)
        total = sum(weight * gain for (_, weight), gain in zip(met, gains, strict=True))
        total += self._pace_doubt**2 + _NOISE**2
        self._log_pace += counted * self._pace_doubt**2 / total
        for (cell, _), gain in zip(met, gains, strict=True):
            cell.log_seconds += counted * gain / total
        remaining = abs(counted) * _NOISE**2 / total  # the noise's part of the error; the rest was learnt
        self._pace_doubt = max(_LEAST_PACE_DOUBT, (self._pace_doubt + min(2 * remaining, _FIRST_PACE_DOUBT)) / 2)
        self._passes += 1
        if abs(counted) > SURPRISE + most_doubt:
            self.surprises += 1
            self._doubt_all()
        for (cell, weight), doubt in zip(met, doubts, strict=True):
            if weight >= 0.5 and abs(counted) < _CONFIRMED:
                cell.growth = max(_LEAST_GROWTH, cell.growth * _SLOWER_GROWTH)
            elif abs(counted) > SURPRISE:
                cell.growth = _GROWTH
            cell.doubt = (1 - weight) * doubt + weight * remaining
            cell.met_at = self._passes

    @property
    def observed(self) -> dict[EngineName, PassSeconds]:
        """Callable from any thread."""
        return {engine: PassSeconds(*self._observed[engine]) for engine in get_args(EngineName)}

    def measure(
        self,
        run: Callable[[EngineName, int, int], float],
        seconds: float,
        possible: Callable[[int, int], bool] = lambda _batch, _step: True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Fill the table by trial passes for about ``seconds`` of ``clock``: first one sequence with steps of all
        lengths, then steps of one token in all batches, then the others; the smallest come first.

        run: makes one pass of an engine, batch and step and returns its seconds. possible: whether a pass of that batch
        and step can run. A cell that is not measured gets the seconds that measured passes of as many tokens would
        take, with more doubt: so it is tried, and then observed, as soon as a request can use it.
        """
        places = [(row, column) for row in range(len(self._batches)) for column in range(len(self._steps))]
        places.sort(key=self._order)
        for engine, table in self._cells.items():
            deadline = clock() + seconds / len(self._cells)
            found = _SecondsByTokens()
            left_out: list[tuple[int, int]] = []
            for index, (row, column) in enumerate(places):
                batch, step = min(self._batches[row], self._largest[0]), min(self._steps[column], self._largest[1])
                expected = _TRIALS * found.seconds(batch * step) if index else 0.0
                if index == 0 or (clock() + expected < deadline and possible(batch, step)):
                    fastest = fastest_trial(partial(run, engine, batch, step))
                    found.add(batch * step, fastest)
                    table[row][column] = _Cell(math.log(fastest), 0.0, _MEASURED_GROWTH, self._passes)
                else:
                    left_out.append((row, column))
            for row, column in left_out:
                tokens = min(self._batches[row], self._largest[0]) * min(self._steps[column], self._largest[1])
                table[row][column] = _Cell(math.log(found.seconds(tokens)), met_at=self._passes)
        self._log_pace = 0.0
        self._least.clear()

    def _order(self, place: tuple[int, int]) -> tuple[int, int]:
        row, column = place
        return 0 if row == 0 else 1 if column == 0 else 2, self._batches[row] * self._steps[column]

    def _doubt(self, cell: _Cell) -> float:
        return min(_MOST_DOUBT, cell.doubt + cell.growth * (self._passes - cell.met_at))

    def _doubt_all(self) -> None:
        """A pass that ran lately takes another time now. So may all others: let their doubts grow fast again."""
        for cell in (cell for table in self._cells.values() for row in table for cell in row):
            cell.doubt, cell.met_at = self._doubt(cell), self._passes
            cell.growth = max(cell.growth, _MEASURED_GROWTH)

    def _least_of_row(self, engine: EngineName, row: int) -> list[float]:
        """Logarithms of the least seconds for each step, at pace 1: the estimate less its doubt, but no less than a
        shorter step takes.
        """
        if self._least_at != self._passes:
            self._least.clear()
            self._least_at = self._passes
        if (engine, row) not in self._least:
            least: list[float] = []
            shorter = -math.inf
            for cell in self._cells[engine][row]:
                shorter = min(cell.log_seconds, max(shorter, cell.log_seconds - self._doubt(cell)))
                least.append(shorter)
            self._least[engine, row] = least
        return self._least[engine, row]

    def _log_seconds(self, engine: EngineName, place: _Place) -> float:
        cells, total = self._cells[engine], place.log_beyond + self._log_pace
        for row, column, weight in place.cells:
            total += weight * cells[row][column].log_seconds
        return total

    def _place(self, batch: int, step: int) -> _Place:
        place = self._places.get((batch, step))
        if place is None:
            beyond = max(1, batch / self._batches[-1]) * max(1, step / self._steps[-1])
            cells = [
                (row, column, down * right)
                for row, down in _neighbours(self._batches, min(batch, self._batches[-1]))
                for column, right in _neighbours(self._steps, min(step, self._steps[-1]))
            ]
            place = _Place(math.log(beyond), sorted(cells, key=lambda cell: -cell[2]))
            self._places[batch, step] = place
        return place


def fastest_trial(run: Callable[[], float]) -> float:
    """The least seconds of some passes alike, which ``run`` returns: the first ones of a kind are slow."""
    fastest, vain = run(), 0
    while vain < _TRIALS - 1:
        seconds = run()
        vain = 0 if seconds < _FASTER * fastest else vain + 1
        fastest = min(fastest, seconds)
    return fastest


class _SecondsByTokens:
    """Seconds of passes by their number of tokens, interpolated in the logarithms of both."""

    def __init__(self) -> None:
        self._found: dict[int, float] = {}

    def add(self, tokens: int, seconds: float) -> None:
        """Of several passes of as many tokens, the slowest counts."""
        self._found[tokens] = max(seconds, self._found.get(tokens, 0.0))

    def seconds(self, tokens: int) -> float:
        """More tokens than any pass has had take proportionally longer, fewer take as long as the smallest pass."""
        known = sorted(self._found)
        if tokens <= known[0]:
            return self._found[known[0]]
        if tokens >= known[-1]:
            return self._found[known[-1]] * tokens / known[-1]
        above = bisect.bisect_left(known, tokens)
        fewer, more = known[above - 1], known[above]
        weight = math.log(tokens / fewer) / math.log(more / fewer)
        return math.pow(self._found[fewer], 1 - weight) * math.pow(self._found[more], weight)


def _powers(largest: int) -> list[int]:
    """1, 2, 4, ... up to the first that is not below ``largest``."""
    return [1 << exponent for exponent in range(math.ceil(math.log2(largest)) + 1)]


def _neighbours(powers: list[int], value: int) -> list[tuple[int, float]]:
    """The powers of two below and above ``value``, by index, each with its weight by logarithms."""
    index = value.bit_length() - 1
    if value == powers[index]:
        return [(index, 1.0)]
    above = math.log2(value / powers[index])
    return [(index, 1 - above), (index + 1, above)]
