"""Mode ``auto`` after a start on a busy machine, compared with one after a start on an idle machine.

    python -m scripts.bench.busy_start ENGINE --loops 8 --requests 200

At start, an LLM measures what passes cost. Here one LLM starts while busy loops use all processors, another one starts
after they have ended. Both then answer the same prompts on the idle machine, one request at a time, in alternating
turns of ten. Each start is repeated; figures are medians over the starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trimode import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
TURN = 10
PARAMS = SamplingParams(mode="auto", max_tokens=128)

Messages = list[dict[str, str]]


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def tokens_per_second(llm: LLM, prompts: list[Messages]) -> float:
    begun, tokens = time.perf_counter(), 0
    for prompt in prompts:
        tokens += llm.generate(prompt, PARAMS).outputs[0].length
    return tokens / (time.perf_counter() - begun)


def compare(engine: Path, prompts: list[Messages], loops: int, requests: int) -> list[tuple[float, float]]:
    """Tokens per second after the busy and after the idle start, for each turn."""
    with busy_loops(loops):
        busy = LLM(engine)
    with busy, LLM(engine) as idle:
        supply = cycle(prompts)
        found = []
        for turn in range(requests // TURN):
            batch = list(islice(supply, TURN))
            both = (busy, idle) if turn % 2 else (idle, busy)
            speeds = {id(llm): tokens_per_second(llm, batch) for llm in both}
            found.append((speeds[id(busy)], speeds[id(idle)]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--loops", type=int, default=8, help="busy loops during the first start")
    parser.add_argument("--requests", type=int, default=200, help="by each LLM")
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    lines = (ROOT / "tests" / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["messages"] for line in lines]
    starts = [compare(options.engine, prompts, options.loops, options.requests) for _ in range(options.starts)]
    table = Table("requests", "busy start, tokens/s", "idle start", "ratio", "least", box=None, header_style="bold")
    for turn, pairs in enumerate(zip(*starts, strict=True)):
        ratios = [busy / idle for busy, idle in pairs]
        speeds = (f"{statistics.median(side):.0f}" for side in zip(*pairs, strict=True))
        spread = f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}"
        table.add_row(f"{turn * TURN + 1} to {(turn + 1) * TURN}", *speeds, *spread)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
