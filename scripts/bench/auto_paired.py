"""Mode `auto` against fixed settings and against an earlier version of this project, in paired, alternating runs.

    git worktree add /tmp/before COMMIT
    python -m scripts.bench.auto_paired engines/tiny-cpu engines/tiny-weak-cpu --before /tmp/before

Every cell is an engine, a kind of prompts, and a number of requests at once. In each turn every setting answers the
same prompts once, in turn forwards and backwards, so that the machine's speed affects all of them alike. A ratio is
that of one turn. Printed are the medians with their 95 % intervals by bootstrap. Where prompts repeat text, ``auto``
with ``lookup`` is compared with ``auto``, too. Times are wall-clock, so the machine must be idle.

Each version runs in a process of its own, and the two wait for each other. Whole processes differ in speed, so each
round starts new ones.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIXED: dict[str, dict[str, Any]] = {"ar": {"mode": "ar"}} | {
    f"linear {block}": {"mode": "linear_spec", "block_length": block} for block in (8, 16, 32)
}
TREE: dict[str, dict[str, Any]] = {"tree 32": {"mode": "linear_spec", "block_length": 32, "tree_width": 32}}
AUTO, BEFORE, LOOKUP = "auto", "auto before", "auto with lookup"
MAX_TOKENS = 200
RESAMPLES = 2000


class Worker:
    """A process that answers prompts with the project of the folder ``root``."""

    def __init__(self, root: Path, engine: Path, load: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(engine.resolve()), str(load)],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tokens_per_second(self, prompts: Sequence[Any], options: dict[str, Any]) -> float:
        sender, receiver = self._process.stdin, self._process.stdout
        assert sender is not None
        assert receiver is not None
        sender.write(json.dumps([prompts, options]) + "\n")
        sender.flush()
        return float(receiver.readline())

    def close(self) -> None:
        self._process.communicate()


def work(engine: str, load: int) -> None:
    """Answer what comes on the standard input, line by line."""
    from trimode import LLM, SamplingParams

    with LLM(engine, max_batch_size=load, prefix_cache_bytes=0) as llm:
        for line in sys.stdin:
            prompts, options = json.loads(line)
            params = SamplingParams(max_tokens=MAX_TOKENS, **options)
            begun = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            print(sum(output.outputs[0].length for output in outputs) / (time.perf_counter() - begun), flush=True)


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median, and its 95 % interval by bootstrap."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return statistics.median(ratios), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def measure(
    workers: dict[str, Worker], prompts: Sequence[Any], turns: int, settings: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """Tokens a second of each setting, by turn. One turn before them warms up, and ``auto`` learns in it."""
    found: dict[str, list[float]] = {name: [] for name in settings}
    for turn in range(turns + 1):
        for name in settings if turn % 2 else reversed(settings):
            speed = workers[BEFORE if name == BEFORE else AUTO].tokens_per_second(prompts, settings[name])
            if turn:
                found[name].append(speed)
    return found


def measure_kinds(
    engine: Path, load: int, before: Path | None, rounds: int, turns: int, prompts: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second by kind of prompts and setting, of all rounds."""
    from scripts.drafting.prompts import KINDS, conversations

    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for _ in range(rounds):
        workers = {AUTO: Worker(ROOT, engine, load)}
        if before is not None:
            workers[BEFORE] = Worker(before, engine, load)
        for kind in KINDS:
            settings = FIXED | TREE | {name: {"mode": "auto"} for name in workers}
            if kind == "copy":
                settings |= {LOOKUP: {"mode": "auto", "lookup": True}}
            for name, speeds in measure(workers, conversations(kind, max(load, prompts)), turns, settings).items():
                found[kind].setdefault(name, []).extend(speeds)
        for worker in workers.values():
            worker.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version, which can read the engines")
    parser.add_argument("--loads", default="1,4,16", help="requests at once, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3, help="of a round")
    parser.add_argument("--prompts", type=int, default=60, help="of a run; at least as many as requests at once")
    parser.add_argument("--json", type=Path, help="also write all speeds to this file")
    arguments = parser.parse_args()
    everything: dict[str, dict[str, list[float]]] = {}
    logs: list[float] = []
    columns = ("auto / best fixed", "auto / before", "lookup / auto")
    print(f"{'engine, prompts, requests':<36}{'best fixed':>12}" + "".join(f"{column:>24}" for column in columns))
    for engine in arguments.engines:
        for load in map(int, arguments.loads.split(",")):
            by_kind = measure_kinds(
                engine, load, arguments.before, arguments.rounds, arguments.turns, arguments.prompts
            )
            for kind, found in by_kind.items():
                best = max([*FIXED, *TREE], key=lambda name: statistics.median(found[name]))
                cells = []
                for over, under in ((AUTO, best), (AUTO, BEFORE), (LOOKUP, AUTO)):
                    if over not in found or under not in found:
                        cells.append("")
                        continue
                    middle, low, high = interval([a / b for a, b in zip(found[over], found[under], strict=True)])
                    cells.append(f"{middle:.3f} [{low:.3f}, {high:.3f}]")
                    if under == BEFORE:
                        logs.append(math.log(middle))
                name = f"{engine.name}, {kind}, {load}"
                print(f"{name:<36}{best:>12}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
                everything[name] = found
    if logs:
        print(f"geometric mean of auto / before: {math.exp(statistics.mean(logs)):.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(everything) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]))
    else:
        main()
