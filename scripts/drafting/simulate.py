"""Compare ways to draft on machines that are not available: replay recorded drafts with cost tables.

    python -m scripts.drafting.simulate record engines/tiny-cpu engines/tiny-weak-cpu --out engines/drafts
    python -m scripts.drafting.simulate compare engines/drafts --cpu engines/tiny-cpu --out engines/drafting.json
    python -m scripts.drafting.simulate report engines/drafting.json --plot docs/images/drafting.png
    python -m scripts.drafting.simulate tokens engines/drafts
    python -m scripts.drafting.simulate check engines/tiny-cpu engines/drafts/tiny-cpu-structured.npz

``record`` runs the engines: the answers to three kinds of prompts, and the drafts after each of their tokens.
``compare`` replays them through the runtime's scheduler. ``tokens`` prints the tokens per cycle of trees and of chains,
with intervals. ``check`` compares the prediction for this CPU with runs of the engine, in processor time by
default, so that it can run beside other work.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.drafting.cost_table import CostTable
from scripts.drafting.machines import of_estimate, of_h100, of_this_cpu
from scripts.drafting.prompts import KINDS, conversations
from scripts.drafting.recording import MAX_TOKENS, Text, read, record, write
from scripts.drafting.replay import Replay
from trimode import LLM, SamplingParams

LINEAR: dict[str, dict[str, Any]] = {
    f"linear {block}": {"mode": "linear_spec", "block_length": block} for block in (4, 8, 16, 32)
}
TREES: dict[str, dict[str, Any]] = {
    f"tree {width}": {"mode": "linear_spec", "block_length": min(width, 32), "tree_width": width}
    for width in (8, 16, 32, 64)
}
CONFIDENT: dict[str, dict[str, Any]] = {
    f"linear {block}, verified to {least}": LINEAR[f"linear {block}"] | {"verified_until": least}
    for block, least in ((16, 0.3), (32, 0.1), (32, 0.3))
}
LOOKUP: dict[str, dict[str, Any]] = {
    "linear 16, lookup": LINEAR["linear 16"] | {"lookup": True},
    "auto, lookup": {"mode": "auto", "lookup": True},
}
FIXED = {"ar": {"mode": "ar"}} | LINEAR | TREES | CONFIDENT
POLICIES = FIXED | LOOKUP | {"auto": {"mode": "auto"}}
LOADS = (1, 4, 16, 64)
GPUS = ("dgx-spark", "b200")
PROMPTS = 20
RESAMPLES = 2000

# By machine, drafter, kind of prompts, load and policy: tokens per second.
Speeds = dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]


def record_all(engines: Sequence[Path], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for engine in engines:
        for kind in KINDS:
            write(record(engine, conversations(kind, PROMPTS)), out / f"{engine.name}-{kind}.npz")
        problems = conversations("prose", PROMPTS) + conversations("structured", PROMPTS)
        write(record(engine, problems, sampling={"temperature": 1.0}), out / f"{engine.name}-temperature1.npz")


def compare(folder: Path, tables: Sequence[CostTable], loads: Sequence[int]) -> Speeds:
    """Replay every recording on every machine. ``auto`` has learnt from one run of the same prompts before."""
    found: Speeds = {}
    for table in tables:
        for path in sorted(folder.glob("*.npz")):
            drafter, kind = path.stem.rsplit("-", 1)
            texts = read(path)
            by_load = found.setdefault(table.name, {}).setdefault(drafter, {}).setdefault(kind, {})
            for load in loads:
                order = [number % len(texts) for number in range(max(len(texts), 2 * load))]
                speeds = by_load[str(load)] = {}
                for name, options in POLICIES.items():
                    replay = Replay(texts, table, load)
                    if options["mode"] == "auto" or "lookup" in options:
                        replay.run(order, options)
                    speeds[name] = replay.run(order, options).tokens_per_second
            print(table.name, drafter, kind, flush=True)
    return found


def ratio(by_kind: dict[str, dict[str, dict[str, float]]], load: str, some: Any, others: Any) -> float:
    """The fastest of some policies divided by the fastest of others: geometric mean over the kinds of prompts."""
    logs = [
        math.log(max(by_load[load][name] for name in some) / max(by_load[load][name] for name in others))
        for by_load in by_kind.values()
    ]
    return math.exp(statistics.mean(logs))


def report(found: Speeds, plot: Path | None) -> list[str]:
    """A Markdown table; also a plot of the same ratios."""
    columns = {
        "best chain, tokens/s": None,
        "tree / chain": (TREES, LINEAR),
        "confident prefix / chain": (CONFIDENT, LINEAR),
        "`auto` / best fixed setting": (["auto"], FIXED),
        "`auto` with lookup / `auto`, repeated questions": (["auto, lookup"], ["auto"]),
    }
    lines = [f"| machine | drafter | requests | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for machine, by_drafter in found.items():
        for drafter, by_kind in by_drafter.items():
            kinds = {kind: by_kind[kind] for kind in KINDS if kind in by_kind}
            for load in next(iter(kinds.values())):
                fastest = statistics.mean(max(each[load][name] for name in LINEAR) for each in kinds.values())
                cells = [f"{fastest:.0f}"]
                for title, sides in columns.items():
                    if sides is not None:
                        chosen = {"copy": kinds["copy"]} if "repeated" in title else kinds
                        cells.append(f"{ratio(chosen, load, *sides):.2f}")
                lines.append(f"| {machine} | {drafter} | {load} | {' | '.join(cells)} |")
    if plot is not None:
        draw(found, plot)
    return lines


def draw(found: Speeds, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(found), 3.4), layout="constrained")
    for axes, (machine, by_drafter) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for drafter, by_kind in by_drafter.items():
            kinds = {kind: by_kind[kind] for kind in KINDS if kind in by_kind}
            loads = list(next(iter(kinds.values())))
            shown = {"tree / chain": ("-", TREES, LINEAR), "auto / best fixed setting": (":", ["auto"], FIXED)}
            for name, (style, *sides) in shown.items():
                values = [ratio(kinds, load, *sides) for load in loads]
                axes.plot([int(load) for load in loads], values, style, marker=".", label=f"{name}, {drafter} drafter")
        axes.axhline(1, color="grey", linewidth=0.5)
        axes.set(title=machine, xscale="log", xlabel="concurrent requests")
        axes.set_xticks([int(load) for load in loads], loads)
    figure.axes[0].set_ylabel("tokens per second, ratio")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def tokens(folder: Path) -> list[str]:
    """Tokens per cycle of chains of 32 and of trees of 32 nodes; their ratio with its 95 % interval over prompts."""
    lines = ["| recording | chain of 32 | tree of 32 | ratio |", "|---|---|---|---|"]
    flat = CostTable.of("flat", "every pass alike", lambda _engine, _batch, _step: 1e-3)
    for path in sorted(folder.glob("*.npz")):
        texts = read(path)
        emitted = np.array([len(text.answer) - 1 for text in texts])
        cycles = [
            np.array([len(each) for each in Replay(texts, flat, 1).run(range(len(texts)), options).cycles])
            for options in (LINEAR["linear 32"], TREES["tree 32"])
        ]
        rng = np.random.default_rng(0)
        drawn = rng.integers(len(texts), size=(RESAMPLES, len(texts)))
        ratios = cycles[0][drawn].sum(axis=1) / cycles[1][drawn].sum(axis=1)
        low, high = np.quantile(ratios, (0.025, 0.975))
        block, tree = (emitted.sum() / each.sum() for each in cycles)
        lines.append(f"| {path.stem} | {block:.2f} | {tree:.2f} | {tree / block:.2f} [{low:.2f}, {high:.2f}] |")
    return lines


def check(engine: Path, texts: Sequence[Text], loads: Sequence[int], clock: Any) -> list[str]:
    """Seconds of real runs beside those predicted, relative to those of ``ar``."""
    table, prompts = of_this_cpu(engine), [text.prompt.tolist() for text in texts]
    lines = ["| requests | policy | predicted, of ar's time | real, of ar's time | error |", "|---|---|---|---|---|"]
    names = ["ar", "linear 8", "linear 16", "linear 32", "tree 16", "tree 32", "auto"]
    for load in loads:
        predicted: dict[str, float] = {}
        for name in names:
            replay = Replay(texts, table, load)
            replay.run(range(len(texts)), POLICIES[name])
            predicted[name] = replay.run(range(len(texts)), POLICIES[name]).seconds
        with LLM(engine, threads=1, max_batch_size=load, prefix_cache_bytes=0) as llm:
            real: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(4):
                for name in names if turn % 2 else reversed(names):
                    begun = clock()
                    llm.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS, **POLICIES[name]), use_tqdm=False)
                    if turn:  # the first round warms up
                        real[name].append(clock() - begun)
        for name in names[1:]:
            expected, was = predicted[name] / predicted["ar"], min(real[name]) / min(real["ar"])
            lines.append(f"| {load} | {name} | {expected:.2f} | {was:.2f} | {expected / was - 1:+.0%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record")
    one.add_argument("engines", type=Path, nargs="+")
    one.add_argument("--out", type=Path, required=True, help="folder of the recordings")
    one = commands.add_parser("compare")
    one.add_argument("folder", type=Path)
    one.add_argument("--cpu", type=Path, help="measure the passes of this engine, for a table of this CPU")
    one.add_argument("--tables", type=Path, nargs="*", default=[], help="cost tables to use in place of all others")
    one.add_argument("--loads", default=",".join(map(str, LOADS)))
    one.add_argument("--out", type=Path, required=True, help="JSON of the speeds")
    one = commands.add_parser("report")
    one.add_argument("speeds", type=Path)
    one.add_argument("--plot", type=Path)
    commands.add_parser("tokens").add_argument("folder", type=Path)
    one = commands.add_parser("check")
    one.add_argument("engine", type=Path)
    one.add_argument("recording", type=Path)
    one.add_argument("--loads", default="1,8")
    one.add_argument("--wall", action="store_true", help="wall-clock time; on an idle machine")
    arguments = parser.parse_args()
    lines: list[str] = []
    if arguments.command == "record":
        record_all(arguments.engines, arguments.out)
    elif arguments.command == "compare":
        tables = [CostTable.read(path) for path in arguments.tables]
        if not tables:
            tables = [of_this_cpu(arguments.cpu)] if arguments.cpu else []
            tables += [of_h100(), *map(of_estimate, GPUS)]
        speeds = compare(arguments.folder, tables, [int(load) for load in arguments.loads.split(",")])
        arguments.out.write_text(json.dumps(speeds, indent=1) + "\n", encoding="utf-8")
    elif arguments.command == "report":
        lines = report(json.loads(arguments.speeds.read_text(encoding="utf-8")), arguments.plot)
    elif arguments.command == "tokens":
        lines = tokens(arguments.folder)
    else:
        clock = time.perf_counter if arguments.wall else time.process_time
        loads = [int(load) for load in arguments.loads.split(",")]
        lines = check(arguments.engine, read(arguments.recording), loads, clock)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
