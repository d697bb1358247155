"""The kinds of prompts that drafting is compared on: held-out problems that the shipped checkpoint answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HELD_OUT = Path(__file__).resolve().parents[2] / "tests" / "data" / "heldout.jsonl"
PROSE = ("explain", "story", "words", "calendar")
STRUCTURED = ("json", "python", "numbered", "spell")
KINDS = ("prose", "structured", "copy")


def conversations(kind: str, count: int) -> list[list[dict[str, Any]]]:
    """Messages. ``copy``: a question that was answered before is asked again, so that its answer can be copied."""
    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    chosen = {"prose": PROSE, "structured": STRUCTURED, "copy": PROSE + STRUCTURED}[kind]
    found = [record for record in records if record["kind"] in chosen]
    found = found[:: max(1, len(found) // count)][:count]
    if kind != "copy":
        return [record["messages"] for record in found]
    return [
        [*record["messages"], {"role": "assistant", "content": record["answer"]}, record["messages"][-1]]
        for record in found
    ]
