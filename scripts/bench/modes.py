"""`make bench`: tokens per second by mode, block length and load, against the PyTorch reference in the same run.

Loads and settings alternate, so that a change of the machine's speed affects all of them. The figures are medians over
the rounds. Then `auto` and the best fixed setting of each load run in pairs, and the ratio of each pair is computed:
the best of several medians is biased upwards. Load is the number of requests that run at once; more are always waiting.
No speed fails the command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from trimode import LLM, CompletionOutput
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.runtime.benchmark.load import Load, measure
from trimode.runtime.benchmark.plot import draw_throughput
from trimode.runtime.benchmark.prompts import BenchmarkPrompt, read_prompts
from trimode.runtime.benchmark.settings import settings_of
from trimode.runtime.benchmark.summary import tokens_per_cycle, tokens_per_pass
from trimode.runtime.benchmark.targets import EngineTarget

ROOT = Path(__file__).resolve().parents[2]
MAX_TOKENS = 200
LOADS = (1, 2, 4, 8, 16)
SETTINGS: dict[str, dict[str, Any]] = dict(
    [
        *settings_of(["ar"], []),
        *settings_of(["linear_spec"], [4, 8, 16, 32]),
        *settings_of(["diffusion"], [16]),
        *settings_of(["auto"], []),
    ]
)
LOSSLESS = [name for name in SETTINGS if not name.startswith("diffusion") and name != "auto"]


@dataclass
class Point:
    """A setting at a load. of_reference: multiple of the reference's speed in the same mode, one request at a time."""

    setting: str
    load: int
    tokens_per_second: float
    tokens_per_forward: float
    acceptance: float
    of_reference: float


@dataclass
class Duel:
    """`auto` against the best fixed setting of a load: median ratio of tokens per second, and its quartiles."""

    load: int
    best_fixed: str
    ratio: float
    quartiles: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="what the engine was built from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=24, help="pairs of auto and the best fixed setting at each load")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--plot", type=Path, help="write the curves to this PNG")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    messages = held_out(arguments.prompts)
    reference = reference_paces(arguments.checkpoint, arguments.engine, messages[:: max(1, len(messages) // 12)])
    points, duels = [], []
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        engines = {
            load: stack.enter_context(LLM(arguments.engine, max_batch_size=load, prefix_cache_bytes=0))
            for load in LOADS
        }
        bar = progress.add_task("bench", total=len(LOADS) * (arguments.rounds * len(SETTINGS) + arguments.pairs))
        paces: dict[tuple[int, str], list[float]] = defaultdict(list)
        answers: dict[tuple[int, str], list[CompletionOutput]] = {}
        for turn in range(-1, arguments.rounds):
            for load, llm in engines.items():
                order = list(SETTINGS)
                for name in order[turn % len(order) :] + order[: turn % len(order)]:
                    pace, answers[load, name] = run(llm, messages, name)
                    if turn >= 0:  # warm
                        paces[load, name].append(pace)
                        progress.advance(bar)
        best = {load: max(LOSSLESS, key=lambda name: statistics.median(paces[load, name])) for load in LOADS}
        ratios: dict[int, list[float]] = defaultdict(list)
        for turn in range(arguments.pairs):
            for load, llm in engines.items():
                order = [best[load], "auto"] if turn % 2 else ["auto", best[load]]
                pair = {name: run(llm, messages, name)[0] for name in order}
                ratios[load].append(pair["auto"] / pair[best[load]])
                progress.advance(bar)
    for load in LOADS:
        points += [point(name, load, paces[load, name], answers[load, name], reference) for name in SETTINGS]
        lower, middle, upper = statistics.quantiles(ratios[load], n=4)
        duels.append(Duel(load, best[load], middle, (lower, upper)))
    accepted = {name: by_position(answers[1, name]) for name in SETTINGS if name.startswith("linear_spec")}
    if arguments.plot:
        draw(points, accepted, arguments.plot)
    if arguments.json:
        print(json.dumps({"points": list(map(asdict, points)), "auto": list(map(asdict, duels))}, indent=2))
    else:
        show(points, duels, reference)


def held_out(count: int) -> list[BenchmarkPrompt]:
    prompts = read_prompts(ROOT / "tests/data/heldout.jsonl")
    return [prompts[at] for at in np.linspace(0, len(prompts) - 1, min(count, len(prompts))).astype(int)]


def run(llm: LLM, prompts: list[BenchmarkPrompt], name: str) -> tuple[float, list[CompletionOutput]]:
    """Tokens per second, and the answers. All requests are sent at once; the engine has as many slots as the load."""
    fields = {"max_tokens": MAX_TOKENS, **SETTINGS[name]}
    measured = measure(EngineTarget(llm, streaming=False), prompts, fields, Load(concurrency=len(prompts)))
    if measured.failures:
        raise measured.failures[0]
    return measured.tokens_per_second, [answer.output for answer in measured.answers if answer.output is not None]


def reference_paces(checkpoint: Path, engine: Path, messages: list[Any]) -> dict[str, float]:
    """Tokens per second of the PyTorch reference in fp32, in each mode."""
    reference = load_reference(Checkpoint(checkpoint))
    with LLM(engine, max_batch_size=1) as llm:
        encoded = [torch.tensor([llm.tokenizer.encode(llm.tokenizer.apply_chat_template(each))]) for each in messages]
    decode: dict[str, Any] = {
        "ar": lambda ids: reference.ar_generate(ids, MAX_TOKENS),
        "linear_spec": lambda ids: reference.linear_spec_generate(ids, MAX_TOKENS, block_length=16),
        "diffusion": lambda ids: reference.generate(ids, MAX_TOKENS, block_length=16, threshold=0.9),
    }
    paces = {}
    for mode, answer in decode.items():
        answer(encoded[0])
        begun = time.perf_counter()
        tokens = sum(answer(ids)[0].shape[1] - ids.shape[1] for ids in encoded)
        paces[mode] = tokens / (time.perf_counter() - begun)
    return paces


def point(
    name: str,
    load: int,
    paces: list[float],
    answers: list[CompletionOutput],
    reference: dict[str, float],
) -> Point:
    mode = SETTINGS[name]["mode"]
    return Point(
        setting=name,
        load=load,
        tokens_per_second=statistics.median(paces),
        tokens_per_forward=tokens_per_pass(answers) or 0.0,
        acceptance=tokens_per_cycle(answers) or 0.0,
        of_reference=statistics.median(paces) / reference["linear_spec" if mode == "auto" else mode],
    )


def by_position(answers: list[CompletionOutput]) -> list[float]:
    """Accepted share of the verified drafts, by position in the block."""
    accepted: list[int] = []
    reached: list[int] = []
    for answer in answers:
        place = 0
        for origin in answer.origins[1:]:
            while place >= len(accepted):
                accepted.append(0)
                reached.append(0)
            reached[place] += 1
            accepted[place] += origin == "accepted"
            place = 0 if origin == "bonus" else place + 1
    return [took / tried for took, tried in zip(accepted, reached, strict=True)]


def show(points: list[Point], duels: list[Duel], reference: dict[str, float]) -> None:
    speeds = ", ".join(f"{mode} {pace:.0f}" for mode, pace in reference.items())
    table = Table("setting", "load", "tokens/s", "per forward", "per cycle", "of reference")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in points:
        table.add_row(
            each.setting,
            str(each.load),
            f"{each.tokens_per_second:.0f}",
            f"{each.tokens_per_forward:.2f}",
            f"{each.acceptance:.2f}",
            f"{each.of_reference:.2f}",
            end_section=each.setting == list(SETTINGS)[-1],
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"reference, one request, block 16, tokens per second: {speeds}")
    table = Table("load", "best fixed", "auto, relative to it", "quartiles of the pairs")
    for duel in duels:
        table.add_row(
            str(duel.load), duel.best_fixed, f"{duel.ratio:.2f}", " to ".join(f"{each:.2f}" for each in duel.quartiles)
        )
    console.print(table)


def draw(points: list[Point], accepted: dict[str, list[float]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw_throughput(left, [(each.setting, each.load, each.tokens_per_second) for each in points])
    for name, shares in accepted.items():
        drafts = shares[: SETTINGS[name]["block_length"] - 1]
        right.plot(range(1, len(drafts) + 1), drafts, marker=".", label=name)
    right.set(
        xlabel="position in the block", ylabel="accepted share of verified drafts", title="Acceptance by position"
    )
    right.set_ylim(0, 1.02)
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
