"""Tokens per second on this CPU by mode and block length, at given acceptances.

    python -m scripts.bench.replayed_drafts --shapes 250m,3b --acceptances 2,4,6,8

With random weights, no draft is accepted. So the passes run, but their results are replaced: every answer is a fixed
text, and the draft of each position is right with a fixed probability. The probability gives ``--acceptances`` tokens
per cycle with blocks of 32.

For each acceptance, `auto` first learns from some answers of a newly loaded engine. One round runs every setting. More
``--rounds`` run `auto` and those fixed settings that reached 0.8 of the best, in alternation, since the machine's speed
changes. Speeds are medians. The last column is the median, over rounds, of the speed of `auto` divided by that of the
best fixed setting.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from scripts.bench.random_engines import random_engine
from trimode import LLM, SamplingParams
from trimode.runtime.api import llm as llm_module
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Executor
from trimode.runtime.loading import load_engine

ROOT = Path(__file__).resolve().parents[2]
PROMPT_TOKENS, LONGEST_BLOCK = 64, 32
FIXED: dict[str, dict[str, Any]] = {"ar": {"mode": "ar"}} | {
    f"linear_spec {block}": {"mode": "linear_spec", "block_length": block} for block in (4, 8, 16, 32)
}
AUTO = "auto"
SETTINGS: dict[str, dict[str, Any]] = FIXED | {AUTO: {"mode": "auto"}}
LEARNING_ANSWERS = 5
LEAST_LOGIT = -20.0  # of every other candidate
CONTENDER = 0.8  # of the best fixed setting's speed in the first round


class ReplayedDrafts:
    """Runs the passes of ``executor`` and returns the candidates of a fixed text. probability: of a right draft, and
    what every draft says of itself.
    """

    def __init__(self, executor: Executor, longest_text: int, first_token: int, tokens: int) -> None:
        self.pool, self.threads = executor.pool, executor.threads
        self.probability = 1.0
        self._executor = executor
        rng = np.random.default_rng(0)
        self._text = rng.integers(first_token, tokens, longest_text + LONGEST_BLOCK + 1)
        self._agreement = rng.random(len(self._text))

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        found = self._executor.run(step)
        positions = np.take_along_axis(step.position_ids, step.logit_rows, axis=1)
        chosen = self._next(positions) if isinstance(step, CausalStep) else self._drafted(positions)
        found.tokens[..., 0] = chosen
        found.logits[...] = LEAST_LOGIT
        found.logits[..., 0] = math.log(self.probability)
        found.log_sum_exp[...] = 0.0
        return found

    def _next(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._text[positions + 1]

    def _drafted(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The text, or a neighbouring token where the draft is wrong."""
        return self._text[positions] + (self._agreement[positions] >= self.probability)


def probability_of(acceptance: float) -> float:
    """The probability of a right draft for which a cycle with a block of 32 emits ``acceptance`` tokens on average."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if sum(middle**place for place in range(LONGEST_BLOCK)) < acceptance else (low, middle)
        )
    return low


class Speeds(NamedTuple):
    """by_setting: median tokens per second. ratio: of `auto` to the best fixed setting."""

    by_setting: dict[str, float]
    ratio: float


def measure(engine: Path, acceptance: float, tokens: int, rounds: int) -> Speeds:
    """Tokens per second of each setting, by a newly loaded engine."""
    replays: list[ReplayedDrafts] = []

    def load(folder: Path, **options: Any) -> Any:
        loaded = load_engine(folder, **options)
        replays.append(
            ReplayedDrafts(loaded.executor, PROMPT_TOKENS + tokens, 200, loaded.manifest.model.vocab_size - 1)
        )
        return loaded._replace(executor=replays[0])

    with mock.patch.object(llm_module, "load_engine", load):
        llm = LLM(engine, max_batch_size=1, prefix_cache_bytes=0)
    with llm:
        replays[0].probability = probability_of(acceptance)
        prompt = replays[0]._text[:PROMPT_TOKENS].tolist()

        def tokens_per_second(name: str) -> float:
            params = SamplingParams(max_tokens=tokens, **SETTINGS[name])
            output = llm.generate(prompt, params).outputs[0]
            return (output.length - 1) / (output.seconds - output.time_to_first_token)

        for _ in range(LEARNING_ANSWERS):
            tokens_per_second(AUTO)
        found = {name: [tokens_per_second(name)] for name in SETTINGS}
        least = CONTENDER * max(found[name][0] for name in FIXED)
        contenders = [AUTO, *(name for name in FIXED if found[name][0] >= least)]
        for turn in range(rounds):
            for name in contenders if turn % 2 else reversed(contenders):
                found[name].append(tokens_per_second(name))
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    best = max(contenders[1:], key=medians.__getitem__)
    ratio = statistics.median(auto / fixed for auto, fixed in zip(found[AUTO], found[best], strict=True))
    return Speeds(medians, ratio)


def header(shape: str) -> str:
    names = "".join(f"{name:>16}" for name in SETTINGS)
    return f"{shape + ', tokens a cycle':<22}{names}{'auto / best':>14}"


def line(acceptance: float, speeds: Speeds) -> str:
    cells = "".join(f"{speed:16.3g}" for speed in speeds.by_setting.values())
    return f"{acceptance:<22g}{cells}{speeds.ratio:14.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="250m,3b", help="with commas")
    parser.add_argument("--acceptances", default="2,4,6,8", help="tokens a cycle, with commas")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--rounds", type=int, default=8, help="of the fastest settings, after one round of all")
    parser.add_argument("--folder", type=Path, default=ROOT / "engines" / "peers", help="keeps models and engines")
    parser.add_argument("--json", type=Path, help="also write the medians to this file")
    arguments = parser.parse_args()
    results: dict[str, dict[float, Speeds]] = {}
    for shape in arguments.shapes.split(","):
        engine = random_engine(shape, arguments.folder, "int8")
        print(header(shape), flush=True)
        results[shape] = {}
        for acceptance in map(float, arguments.acceptances.split(",")):
            results[shape][acceptance] = measure(engine, acceptance, arguments.tokens, arguments.rounds)
            print(line(acceptance, results[shape][acceptance]), flush=True)
    if arguments.json:
        plain = {shape: {key: speeds._asdict() for key, speeds in by.items()} for shape, by in results.items()}
        arguments.json.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
