"""Texts in every mode, to compare the executors of two targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimode import LLM, SamplingParams

MODES: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 16},
    {"mode": "linear_spec", "block_length": 7, "draft_threshold": 0.5, "adapter": False},
    {"mode": "auto", "block_length": 8},
    {"mode": "diffusion", "block_length": 8},
]


def conversations(heldout: list[dict]) -> list[Any]:
    """Six short problems."""
    return [record["messages"] for record in heldout[::29][:6]]


def answers(engine: Path, heldout: list[dict], options: dict[str, Any], at_once: int) -> list[list[int]]:
    """The tokens of the answers to :func:`conversations`, ``at_once`` of them in a batch."""
    with LLM(engine, max_batch_size=at_once, verify=False) as llm:
        outputs = llm.generate(conversations(heldout), SamplingParams(max_tokens=60, **options))
        return [output.outputs[0].token_ids for output in outputs]


def listen(executor: Any) -> list[tuple[str, Any]]:
    """A list that records the name and the step of each later call of ``executor``."""
    calls: list[tuple[str, Any]] = []

    def listening(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(step: Any, *arguments: Any) -> Any:
            calls.append((name, step))
            return call(step, *arguments)

        return called

    for name in ("run", "speculate"):
        setattr(executor, name, listening(name, getattr(executor, name)))
    return calls
