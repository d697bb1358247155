"""Counts that show how cycles draft, what ``auto`` chose, and why: for metrics.

The scheduler's thread counts. Other threads read snapshots.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from trimode.runtime.request.outputs import Cycle, Drafting
from trimode.runtime.request.sampling_params import Mode
from trimode.runtime.scheduling.auto_block import Expectation, Plan
from trimode.runtime.scheduling.pass_cost import EngineName, PassSeconds

LONGEST_BUCKET = 64

ChosenDrafting = Literal["none", "draft", "tree", "copy"]


class CycleKey(NamedTuple):
    """block: the least power of two that is not below the block's tokens; 0 above LONGEST_BUCKET."""

    mode: Mode
    drafting: Drafting
    block: int


class CycleSums(NamedTuple):
    """Number of cycles, and sums over them, as :class:`Cycle`."""

    cycles: float
    verified: float
    expected: float
    emitted: float


class ChoiceKey(NamedTuple):
    """block: the longest block of the cycle. drafting: ``copy`` if a sequence copies. trial: as :class:`Plan`."""

    block: int
    drafting: ChosenDrafting
    trial: bool


class DraftingStats(NamedTuple):
    """cycles: of finished answers of ``auto`` and ``linear_spec``. choices: scheduler steps by the choice of ``auto``.
    expectations: of the latest choice, by block length. passes: by engine.
    """

    cycles: dict[CycleKey, CycleSums]
    choices: dict[ChoiceKey, int]
    expectations: dict[int, Expectation]
    passes: dict[EngineName, PassSeconds]


class DraftingCounts:
    """Counts cycles and choices."""

    def __init__(self) -> None:
        # By mode, drafting and block: number of cycles, and sums of their verified, expected and emitted tokens.
        self._cycles: dict[tuple[Mode, Drafting, int], list[float]] = {}
        self._choices: dict[ChoiceKey, int] = {}

    def count_choice(self, plan: Plan) -> None:
        """A scheduler step drafts by ``plan``."""
        drafting: ChosenDrafting = "tree" if plan.tree else "draft" if plan.block > 1 else "none"
        copies = True in plan.copying
        key = ChoiceKey(plan.copy_block if copies else plan.block, "copy" if copies else drafting, plan.trial)
        self._choices[key] = self._choices.get(key, 0) + 1

    def count_cycles(self, mode: Mode | None, cycles: Iterable[Cycle]) -> None:
        """An answer has finished. Cycles of ``ar`` are not counted here."""
        if mode is None or mode == "ar":
            return
        found = self._cycles
        for drafting, drafted, verified, expected, emitted, _ in cycles:
            key = mode, drafting, drafted
            if key in found:
                sums = found[key]
                sums[0] += 1
                sums[1] += verified
                sums[2] += expected
                sums[3] += emitted
            else:
                found[key] = [1, verified, expected, emitted]

    def cycles(self) -> dict[CycleKey, CycleSums]:
        """Callable from any thread."""
        by_key: dict[CycleKey, CycleSums] = {}
        for (mode, drafting, block), sums in self._cycles.copy().items():
            key = CycleKey(mode, drafting, 1 << (block - 1).bit_length() if block <= LONGEST_BUCKET else 0)
            before = by_key.get(key, (0, 0, 0, 0))
            by_key[key] = CycleSums(*(some + more for some, more in zip(before, sums, strict=True)))
        return by_key

    def choices(self) -> dict[ChoiceKey, int]:
        """Callable from any thread."""
        return self._choices.copy()
