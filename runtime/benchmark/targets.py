"""What a benchmark measures: answers of an engine in this process, or of a server."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.benchmark.prompts import BenchmarkPrompt
from trimode.runtime.request.outputs import CompletionOutput
from trimode.runtime.request.sampling_params import SamplingParams


class Answered(NamedTuple):
    """One answer. tokens: of it. prompt_tokens: None if unknown. first, seconds: seconds from the request to the first
    token and to the end. gaps: seconds between two updates of the stream; empty without a stream. output: of an engine
    in this process.
    """

    tokens: int
    prompt_tokens: int | None
    first: float
    seconds: float
    gaps: list[float]
    output: CompletionOutput | None = None


class Target(Protocol):
    async def answer(self, prompt: BenchmarkPrompt, fields: dict[str, Any]) -> Answered:
        """``fields``: of :class:`SamplingParams`. Raises TriModeError if the request fails."""


class EngineTarget:
    """streaming: take every update of the answer as it comes; otherwise the answer arrives whole, and its times are
    those of the scheduler, which disturbs the engine least.
    """

    def __init__(self, llm: EngineLLM, *, streaming: bool) -> None:
        self._llm = llm
        self._streaming = streaming

    async def answer(self, prompt: BenchmarkPrompt, fields: dict[str, Any]) -> Answered:
        clock = StreamClock()
        request = self._llm.generate_async(prompt, SamplingParams(**fields), streaming=self._streaming)
        (output,) = request.outputs
        async for _ in request:
            if output.token_ids_diff:
                clock.update()
        count = len(request.prompt_token_ids)
        if self._streaming:
            return Answered(output.length, count, clock.first, clock.seconds, clock.gaps, output)
        first, seconds = output.time_to_first_token or 0.0, output.seconds or 0.0
        return Answered(output.length, count, first, seconds, [], output)


class StreamClock:
    """The times of a stream's updates, from now on."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._updates: list[float] = []

    def update(self) -> None:
        self._updates.append(time.perf_counter() - self._begun)

    @property
    def first(self) -> float:
        return self._updates[0] if self._updates else self.seconds

    @property
    def seconds(self) -> float:
        """To the latest update."""
        return self._updates[-1] if self._updates else time.perf_counter() - self._begun

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self._updates, self._updates[1:], strict=False)]
