"""The reason of a cycle, in one line."""

from __future__ import annotations

import pytest

from trimode.runtime.request.cycle_reason import cycle_reason
from trimode.runtime.request.outputs import Choice, Cycle, Drafting, DraftRecord

RATES = {1: 900.0, 8: 1234.6, 16: 1100.0}
FASTEST = "block 8 is expected to be fastest, 1,235 tokens/s"


def cycle(drafting: Drafting, choice: Choice | None) -> Cycle:
    return Cycle(drafting, 8, 8, 3.0, 4, DraftRecord([1, 2], None, [0, 1], choice))


@pytest.mark.parametrize(
    ("drafting", "choice", "reason"),
    [
        ("draft", Choice(8, False, RATES), f"{FASTEST}, then block 16, 1,100"),
        ("tree", Choice(8, False, RATES), f"{FASTEST}, then block 16, 1,100"),
        ("copy", Choice(8, False, RATES), f"{FASTEST}, then block 16, 1,100"),
        ("draft", Choice(16, True, RATES), f"trial of block 16, to measure its pass times; {FASTEST}"),
        ("none", Choice(8, False, {1: 900.0}), "block 1 is expected to be fastest, 900 tokens/s"),
        ("draft", None, "set by the request"),
        ("tree", None, "set by the request"),
        ("none", None, "nothing to draft"),
        ("kept", None, "the last verification predicted enough tokens, so no draft pass is needed"),
        ("kept", Choice(8, False, RATES), "the last verification predicted enough tokens, so no draft pass is needed"),
        ("forced", Choice(8, False, RATES), "the next tokens are known, so no draft pass is needed"),
    ],
)
def test_reasons(drafting: Drafting, choice: Choice | None, reason: str) -> None:
    assert cycle_reason(cycle(drafting, choice)) == reason


def test_a_cycle_without_a_record_has_none() -> None:
    with pytest.raises(ValueError, match="set record_drafts"):
        cycle_reason(Cycle("draft", 8, 8, 3.0, 4))
