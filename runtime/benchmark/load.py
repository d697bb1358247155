"""Loads: how requests arrive at a target."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from trimode.common.errors import TriModeError
from trimode.runtime.benchmark.prompts import BenchmarkPrompt
from trimode.runtime.benchmark.targets import Answered, Target


class Load(NamedTuple):
    """concurrency: requests that run at once; the next one begins when one ends. Or rate: requests a second, whose
    arrivals are a Poisson process, whether or not earlier ones have ended.
    """

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.rate:g}/s" if self.concurrency is None else str(self.concurrency)


@dataclass
class Measured:
    """The answers to one load, and its failures. seconds: from the first request to the end of the last answer."""

    answers: list[Answered] = field(default_factory=list)
    failures: list[TriModeError] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds


def measure(target: Target, prompts: Sequence[BenchmarkPrompt], fields: dict[str, Any], load: Load) -> Measured:
    """Answer every prompt once. fields: of :class:`SamplingParams`. Raises the first error if every request fails."""
    found = asyncio.run(_run(target, prompts, fields, load))
    if not found.answers:
        raise found.failures[0]
    return found


async def _run(target: Target, prompts: Sequence[BenchmarkPrompt], fields: dict[str, Any], load: Load) -> Measured:
    found = Measured()

    async def ask(prompt: BenchmarkPrompt) -> None:
        try:
            found.answers.append(await target.answer(prompt, fields))
        except TriModeError as error:
            found.failures.append(error)

    begun = time.perf_counter()
    if load.rate is None:
        await _at_once(prompts, ask, load.concurrency or len(prompts))
    else:
        await _at_rate(prompts, ask, load.rate)
    found.seconds = time.perf_counter() - begun
    return found


Ask = Callable[[BenchmarkPrompt], Awaitable[None]]


async def _at_once(prompts: Sequence[BenchmarkPrompt], ask: Ask, clients: int) -> None:
    waiting = iter(prompts)

    async def client() -> None:
        for prompt in waiting:
            await ask(prompt)

    await asyncio.gather(*(client() for _ in range(clients)))


async def _at_rate(prompts: Sequence[BenchmarkPrompt], ask: Ask, rate: float) -> None:
    """The arrivals are the same in every run."""
    begun = time.perf_counter()
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1 / rate, len(prompts)))

    async def arrive(prompt: BenchmarkPrompt, after: float) -> None:
        await asyncio.sleep(max(0.0, begun + after - time.perf_counter()))
        await ask(prompt)

    await asyncio.gather(*(arrive(prompt, after) for prompt, after in zip(prompts, arrivals.tolist(), strict=True)))
