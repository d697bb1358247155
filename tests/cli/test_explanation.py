"""The explanation of an answer's cycles."""

from __future__ import annotations

from trimode.cli.explanation import explain
from trimode.runtime.request.outputs import Choice, Cycle, DraftRecord


def test_what_auto_chose() -> None:
    choices = [
        Choice(1, False, {1: 1000.0, 2: 900.0}),
        Choice(4, True, {1: 1000.0, 2: 900.0}),
        Choice(1, False, {1: 1234.4, 2: 900.0}),
    ]
    cycles = [Cycle("none", 1, 1, 1.0, 1, DraftRecord([1], None, [0], choice)) for choice in choices]
    rows = [line.split() for line in explain(cycles, lambda *_: 1e-3, 4)]
    assert rows[-3:] == [
        ["tokens/s", "expected", "at", "last", "1234", "900", "-"],
        ["cycles", "that", "chose", "the", "length", "2", "0", "0"],
        ["cycles", "that", "tried", "it", "0", "0", "1"],
    ]


def test_means_by_kind_and_pass_costs() -> None:
    cycles = [
        Cycle("draft", 32, 16, 10.0, 9),
        Cycle("draft", 32, 32, 20.0, 22),
        Cycle("copy", 8, 8, 6.0, 8),
        Cycle("none", 1, 1, 1.0, 1),
    ]
    lines = explain(cycles, lambda engine, batch, step: 1e-3 * batch * step * (2 if engine == "diffusion" else 1), 8)
    rows = [line.split() for line in lines]
    assert rows[1][-5:] == ["1", "1.0", "1.0", "1.0", "1.0"]
    assert rows[2][-5:] == ["2", "32.0", "24.0", "15.0", "15.5"]
    assert rows[3][-5:] == ["1", "8.0", "8.0", "6.0", "8.0"]
    assert rows[5] == ["draft", "2.00", "4.00", "8.00", "16.00"]
    assert rows[6] == ["commit", "1.00", "2.00", "4.00", "8.00"]
