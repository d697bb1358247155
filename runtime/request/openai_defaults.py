"""What requests of OpenAI's API leave out, for all servers that speak it."""

from __future__ import annotations

from typing import Any


def set_temperature(given: dict[str, Any]) -> None:
    """Complete fields of SamplingParams in place.

    OpenAI's default temperature is 1. A request without one is greedy here, except where only sampling makes sense:
    for several answers, or with ``min_p``. At temperature 0, ``min_p`` has no effect.
    """
    if given.get("temperature") == 0:
        given.pop("min_p", None)
    elif given.get("n", 1) > 1 or given.get("min_p"):
        given.setdefault("temperature", 1.0)
