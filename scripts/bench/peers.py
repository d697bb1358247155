"""`make peers`: milliseconds of a pass on this CPU, compared with llama.cpp in alternation.

    python -m scripts.bench.peers --shapes tiny,250m,3b --rounds 5

For each shape it writes random w4a16 weights with an int4 head, builds them for target ``cpu`` with int8 and with exact
activations, and writes a GGUF file in Q4_0 of the same sizes. A pass has 1 to 32 tokens after 256 KV rows and returns
the logits of every token. llama.cpp runs in a separate process and environment (``.peers``). A last line for each shape
gives the resident memory of a process that runs the AR and the diffusion engine with int8 activations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
from rich.console import Console
from rich.table import Table

from scripts.bench.llama_worker import KV_ROWS, MOST_TOKENS
from scripts.bench.random_engines import random_checkpoint, random_engine
from scripts.bench.resident_memory import resident_mib
from scripts.gpu.random_w4a16_checkpoint import SHAPES
from trimode.engine.manifest import Manifest
from trimode.runtime.cpu.cpu_executor import CpuExecutor
from trimode.runtime.executor import CausalStep

ROOT = Path(__file__).resolve().parents[2]
PEER_PYTHON = ROOT / ".peers" / "bin" / "python"
TOKENS = (1, 2, 4, 8, 16, 32)
LLAMA, DEFAULT, EXACT = "llama.cpp Q4_0", "TriMode, int8 activations", "TriMode, exact"

Measure = Callable[[int], float]


class Llama:
    """llama.cpp in its own process."""

    def __init__(self, model: Path, threads: int) -> None:
        command = [PEER_PYTHON, "-m", "scripts.bench.llama_worker", "run", model, str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]
        self.version = self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def milliseconds(self, tokens: int) -> float:
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def random_gguf(shape: str, folder: Path) -> Path:
    """A GGUF file in Q4_0 with the sizes of ``shape``. An existing one is used again."""
    model = folder / f"random-{shape}.gguf"
    if not model.exists():
        partial = model.with_suffix(".partial")
        config = random_checkpoint(shape, folder) / "config.json"
        subprocess.run(
            [PEER_PYTHON, "-m", "scripts.bench.llama_worker", "write", config, partial], cwd=ROOT, check=True
        )
        partial.rename(model)
    return model


def engine_pass(engine: Path, threads: int) -> Measure:
    """The time of one pass of the AR engine, in milliseconds, by tokens."""
    executor = CpuExecutor(engine, Manifest.read(engine), threads)
    executor.pool.acquire()
    executor.pool.reserve(KV_ROWS + MOST_TOKENS)

    def milliseconds(tokens: int) -> float:
        ids = np.arange(200, 200 + tokens)[None]
        step = CausalStep.chain(0, ids, np.array([KV_ROWS]), np.arange(tokens)[None], top_k=1)
        start = time.perf_counter()
        executor.run(step)
        return (time.perf_counter() - start) * 1e3

    return milliseconds


def compare(shape: str, folder: Path, threads: int, rounds: int) -> dict[str, dict[int, float]]:
    """Median milliseconds by implementation and tokens. The implementations alternate."""
    int8, exact = random_engine(shape, folder, "int8"), random_engine(shape, folder, "fp32")
    with Llama(random_gguf(shape, folder), threads) as llama:
        sides: dict[str, Measure] = {
            LLAMA: llama.milliseconds,
            DEFAULT: engine_pass(int8, threads),
            EXACT: engine_pass(exact, threads),
        }
        found: dict[str, dict[int, list[float]]] = {name: {tokens: [] for tokens in TOKENS} for name in sides}
        for turn in range(rounds + 1):
            for tokens in TOKENS:
                for name, measure in sides.items():
                    measure(tokens)  # warm up caches and threads after the other implementation
                    milliseconds = measure(tokens)
                    if turn:
                        found[name][tokens].append(milliseconds)
    return {name: {tokens: statistics.median(times) for tokens, times in by.items()} for name, by in found.items()}


def print_table(shape: str, medians: dict[str, dict[int, float]], console: Console) -> None:
    table = Table(shape, *(str(tokens) for tokens in TOKENS), box=None, header_style="bold", pad_edge=False)
    for name, by_tokens in medians.items():
        table.add_row(f"{name}, ms", *(f"{by_tokens[tokens]:.3g}" for tokens in TOKENS))
    for name in (DEFAULT, EXACT):
        ratios = (medians[LLAMA][tokens] / medians[name][tokens] for tokens in TOKENS)
        table.add_row(f"llama.cpp over {name}", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)


def memory_line(shape: str, folder: Path) -> str:
    weights = sum(file.stat().st_size for file in random_checkpoint(shape, folder).rglob("*.safetensors")) / 2**20
    resident = resident_mib(random_engine(shape, folder, "int8"))
    return f"resident: {resident:.0f} MiB; the checkpoint's weights: {weights:.0f} MiB; {resident / weights:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tiny,250m,3b", help=f"of {', '.join(SHAPES)}, with commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / "engines" / "peers", help="keeps models and engines")
    parser.add_argument("--json", type=Path, help="also write the medians to this file")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    console, results = Console(highlight=False, width=120), {}
    for shape in arguments.shapes.split(","):
        results[shape] = compare(shape, arguments.folder, arguments.threads, arguments.rounds)
        print_table(shape, results[shape], console)
        console.print(memory_line(shape, arguments.folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
