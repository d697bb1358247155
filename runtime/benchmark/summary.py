"""The figures of a benchmark: one point for each setting and load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from trimode.runtime.benchmark.load import Load, Measured
from trimode.runtime.request.outputs import CompletionOutput


class Percentiles(NamedTuple):
    """Of times in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    def __str__(self) -> str:
        return " / ".join(f"{value:.{1 if value < 10 else 0}f}" for value in self[1:])

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles | None:
        """None without values."""
        if not seconds:
            return None
        middle, high, highest = np.percentile(seconds, [50, 90, 99]) * 1000
        return cls(statistics.fmean(seconds) * 1000, float(middle), float(high), float(highest))


@dataclass
class Point:
    """A setting at a load.

    concurrency, rate: of :class:`Load`. requests, failed: answered and failed ones. seconds: wall time of all.
    first_token: from the request to the first token. per_token: of each answer, the time behind its first token,
    divided by the number of its later tokens. between_updates: from one update of a stream to the next, which may have
    many tokens; None without streams. answer: from the request to the end. tokens_per_pass, tokens_per_cycle: None for
    a server, which does not report them.
    """

    setting: str
    concurrency: int | None
    rate: float | None
    requests: int
    failed: int
    prompt_tokens: int | None
    tokens: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    first_token: Percentiles | None
    per_token: Percentiles | None
    between_updates: Percentiles | None
    answer: Percentiles | None
    tokens_per_pass: float | None
    tokens_per_cycle: float | None

    @property
    def load(self) -> Load:
        return Load(self.concurrency, self.rate)

    @classmethod
    def of(cls, setting: str, load: Load, measured: Measured) -> Point:
        answers = measured.answers
        outputs = [answer.output for answer in answers if answer.output is not None]
        prompts = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
        later = [(answer.seconds - answer.first) / (answer.tokens - 1) for answer in answers if answer.tokens > 1]
        return cls(
            setting=setting,
            concurrency=load.concurrency,
            rate=load.rate,
            requests=len(answers),
            failed=len(measured.failures),
            prompt_tokens=sum(prompts) if len(prompts) == len(answers) else None,
            tokens=sum(answer.tokens for answer in answers),
            seconds=measured.seconds,
            requests_per_second=len(answers) / measured.seconds,
            tokens_per_second=measured.tokens_per_second,
            first_token=Percentiles.of([answer.first for answer in answers]),
            per_token=Percentiles.of(later),
            between_updates=Percentiles.of([gap for answer in answers for gap in answer.gaps]),
            answer=Percentiles.of([answer.seconds for answer in answers]),
            tokens_per_pass=tokens_per_pass(outputs),
            tokens_per_cycle=tokens_per_cycle(outputs),
        )


def tokens_per_pass(outputs: Sequence[CompletionOutput]) -> float | None:
    """Tokens for each draft, denoise or commit pass, without the first tokens, which prefills yield."""
    passes = sum(output.counts.draft + output.counts.denoise + output.counts.commit for output in outputs)
    return sum(output.length - 1 for output in outputs) / passes if passes else None


def tokens_per_cycle(outputs: Sequence[CompletionOutput]) -> float | None:
    """Tokens for each cycle, without the first tokens."""
    cycles = sum(output.counts.cycles for output in outputs)
    return sum(output.length - 1 for output in outputs) / cycles if cycles else None


def print_points(points: Sequence[Point], console: Console) -> None:
    """Times are percentiles 50 / 90 / 99 in milliseconds."""
    table = Table("setting", "load", "tokens/s", "first token, ms", "per token, ms", "answer, ms", "tokens/pass")
    for column in table.columns[1:]:
        column.justify = "right"
    for place, point in enumerate(points):
        last_of_load = place + 1 == len(points) or points[place + 1].load != point.load
        table.add_row(
            point.setting,
            str(point.load),
            f"{point.tokens_per_second:.0f}",
            *(str(times or "-") for times in (point.first_token, point.per_token, point.answer)),
            "-" if point.tokens_per_pass is None else f"{point.tokens_per_pass:.2f}",
            end_section=last_of_load,
        )
    console.print(table)
    console.print("times: percentiles 50 / 90 / 99")
