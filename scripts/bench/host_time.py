"""Processor time of the host for each cycle, by way of drafting: everything outside the engines.

    python -m scripts.bench.host_time

A scheduler runs a made-up engine whose drafts are often wrong, so that trees are wide and paths change. Then the same
passes run without the scheduler, and their time is subtracted. Processor time depends little on other work on the
machine. The settings take turns. Printed are the least values over rounds of the mean of a cycle.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.support.exact_law import NoText
from trimode import SamplingParams
from trimode.runtime.decoding.acceptance_rates import Acceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Executor
from trimode.runtime.kv.host_kv_pool import KvPool
from trimode.runtime.scheduling.pass_cost import PassCost
from trimode.runtime.scheduling.running_request import Request
from trimode.runtime.scheduling.scheduler import Scheduler

MASK, END, VOCABULARY = 100, 11, 131_072
CAPACITY, TOKENS, PROMPT = 1024, 512, (300, 301, 302)
RANKS = 64  # candidates that the engine returns at most
# Where the right token is among a draft's candidates: first, second, third, or not at all.
RIGHT_AT = (0.75, 0.12, 0.05, 0.08)
# A tuple has the values of the requests, repeated.
SETTINGS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "linear 32": {"mode": "linear_spec", "block_length": 32},
    "linear, mixed": {"mode": "linear_spec", "block_length": (32, 5, 17, 2, 24, 9, 13, 28)},
    "tree 16": {"mode": "linear_spec", "block_length": 16, "tree_width": 16},
    "tree 32": {"mode": "linear_spec", "block_length": 32, "tree_width": 32},
    "tree 64": {"mode": "linear_spec", "block_length": 32, "tree_width": 64},
    "tree 32, temperature 1": {"mode": "linear_spec", "block_length": 32, "tree_width": 32, "temperature": 1.0},
    "auto": {"mode": "auto"},
}


class MadeUpExecutor:
    """The right token of a position is the position plus 1000. steps: of the passes so far."""

    threads = None

    def __init__(self) -> None:
        self.pool = KvPool(layers=1, kv_heads=1, head_dim=1, capacity=CAPACITY)
        self.steps: list[CausalStep | BidirectionalStep] = []
        self._draw = np.random.default_rng(0)

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        self.steps.append(step)
        self.pool.reserve(step.rows_written)
        batch, rows = step.logit_rows.shape
        ranks = min(step.top_k or RANKS, RANKS)
        right = np.take_along_axis(step.position_ids, step.logit_rows, axis=1) + 1000
        tokens = self._draw.integers(2000, VOCABULARY, (batch, rows, ranks))
        if isinstance(step, CausalStep):
            tokens[..., 0] = right + 1
        else:
            rank = self._draw.choice(len(RIGHT_AT), (batch, rows), p=RIGHT_AT)
            for at in range(min(ranks, len(RIGHT_AT) - 1)):
                tokens[..., at] = np.where(rank == at, right, tokens[..., at])
        logits = np.tile(-0.9 * np.arange(ranks, dtype=np.float32), (batch, rows, 1))
        sums = np.full((batch, rows), 0.55, np.float32)
        return Candidates(logits, tokens, sums)


def seconds_a_cycle(options: dict[str, Any], batch: int) -> tuple[float, float]:
    """Seconds of the host and tokens of a cycle."""
    executor = MadeUpExecutor()
    engine: Executor = executor
    cost = PassCost(batch, 64)
    cost.measure(lambda _engine, each, step: 1e-3 + 1e-6 * each * step, seconds=1e9)
    scheduler = Scheduler(
        engine,
        max_batch=batch,
        context=CAPACITY,
        prefill_tokens=CAPACITY,
        cost=cost,
        prefix_cache=None,
    )
    for number in range(batch):
        own = {key: value[number % len(value)] if isinstance(value, tuple) else value for key, value in options.items()}
        params = SamplingParams(max_tokens=TOKENS, **own)
        sequence = Sequence(
            list(PROMPT),
            params,
            Ending(params, frozenset({END})),
            Acceptance(),
            context=CAPACITY,
            mask_id=MASK,
            prefill_step=CAPACITY,
            seed=number,
        )
        text: Any = NoText()
        scheduler.waiting.append(Request(sequence, text, _ignore, request_id=number, index=0, update_seconds=None))
    scheduler.step()  # the prefill
    executor.steps.clear()
    begun, cycles = time.thread_time(), 0
    while scheduler.busy:
        scheduler.step()
        cycles += 1
    spent = time.thread_time() - begun
    passes = executor.steps[:]
    for _ in range(batch):
        executor.pool.acquire(CAPACITY)
    begun = time.thread_time()
    for step in passes:
        executor.run(step)
    return (spent - (time.thread_time() - begun)) / cycles, (TOKENS - 1) / cycles


def _ignore(_update: Any) -> None:
    """The answers are of no interest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,16", help="concurrent requests, with commas")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    table = Table("setting", "requests", "ms per cycle", "tokens per cycle of one request")
    for batch in map(int, arguments.batches.split(",")):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
        for turn in range(arguments.rounds + 1):
            for name, options in SETTINGS.items():
                each = seconds_a_cycle(options, batch)
                if turn:  # the first round warms up
                    found[name].append(each)
        for name, values in found.items():
            seconds, tokens = min(values)
            table.add_row(name, str(batch), f"{1e3 * seconds:.3f}", f"{tokens:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
