"""``trimode generate --explain``: how the cycles of an answer drafted, and what passes cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import fmean
from typing import get_args

from trimode.runtime.request.outputs import Cycle, Drafting
from trimode.runtime.scheduling.pass_cost import EngineName

_MEANINGS: dict[Drafting, str] = {
    "none": "no drafts (AR)",
    "draft": "draft pass",
    "tree": "draft pass, verified as a tree",
    "copy": "copied by lookup, no draft pass",
    "kept": "kept from the last commit",
    "forced": "forced by the grammar",
}


def explain(cycles: list[Cycle], pass_seconds: Callable[[EngineName, int, int], float], longest: int) -> list[str]:
    """Lines for the terminal: means over the cycles of each kind, the seconds of passes for one request, and by block
    length what ``auto`` expected last and how often it chose it.

    pass_seconds: by engine, batch and step. longest: tokens of the longest block.
    """
    by_kind: dict[Drafting, list[Cycle]] = defaultdict(list)
    for cycle in cycles:
        by_kind[cycle.drafting].append(cycle)
    lines = [f"{'drafts of a cycle':<32}{'cycles':>8}{'drafted':>9}{'verified':>10}{'expected':>10}{'emitted':>9}"]
    for kind in get_args(Drafting):
        if found := by_kind.get(kind):
            drafted, verified, expected, emitted = (
                fmean(getattr(cycle, field) for cycle in found)
                for field in ("drafted", "verified", "expected", "emitted")
            )
            lines.append(
                f"{_MEANINGS[kind]:<32}{len(found):>8}{drafted:>9.1f}{verified:>10.1f}{expected:>10.1f}{emitted:>9.1f}"
            )
    steps = [1 << exponent for exponent in range(longest.bit_length())]
    lines.append("milliseconds of a pass" + " " * 10 + "".join(f"{f'{step} tok':>9}" for step in steps))
    names: dict[EngineName, str] = {"diffusion": "draft", "ar": "commit"}
    for engine, name in names.items():
        lines.append(f"{name:<32}" + "".join(f"{1e3 * pass_seconds(engine, 1, step):>9.2f}" for step in steps))
    choices = [cycle.record.choice for cycle in cycles if cycle.record and cycle.record.choice]
    if choices:
        latest = choices[-1].rates
        chosen = Counter((choice.block, choice.trial) for choice in choices)
        for name, cells in {
            "tokens/s expected at last": (f"{latest[step]:.0f}" if step in latest else "-" for step in steps),
            "cycles that chose the length": (str(chosen[step, False]) for step in steps),
            "cycles that tried it": (str(chosen[step, True]) for step in steps),
        }.items():
            lines.append(f"{name:<32}" + "".join(f"{cell:>9}" for cell in cells))
    return lines
