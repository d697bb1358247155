"""Why a cycle drafted as it did, in one line for people."""

from __future__ import annotations

from trimode.runtime.request.outputs import Cycle, Drafting

_WITHOUT_DRAFT_PASS: dict[Drafting, str] = {
    "kept": "the last verification predicted enough tokens, so no draft pass is needed",
    "forced": "the next tokens are known, so no draft pass is needed",
}


def cycle_reason(cycle: Cycle) -> str:
    """The reason of a cycle with a record. Raises ValueError if it has none."""
    if cycle.record is None:
        raise ValueError("the cycle has no record; set record_drafts")
    if cycle.drafting in _WITHOUT_DRAFT_PASS:
        return _WITHOUT_DRAFT_PASS[cycle.drafting]
    choice = cycle.record.choice
    if choice is None:
        return "nothing to draft" if cycle.drafting == "none" else "set by the request"
    (best, rate), *others = sorted(choice.rates.items(), key=lambda found: -found[1])
    fastest = f"block {best} is expected to be fastest, {rate:,.0f} tokens/s"
    if choice.trial:
        return f"trial of block {choice.block}, to measure its pass times; {fastest}"
    if not others:
        return fastest
    return f"{fastest}, then block {others[0][0]}, {others[0][1]:,.0f}"
