"""Compare engines that are divided among ranks with whole ones: tokens in all modes, in batches, with prefix reuse.

    python -m scripts.prove.ranks [--prompts N] [--json]

The shipped checkpoint is divided among 2 ranks, and a network with 8 KV heads and random weights among 2 and 4. Each
rank is a process with MPI between them, as in use. Needs the extras ``build`` and ``mpi``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from scripts.prove.proof_table import ProofRow, print_table
from tests.support.random_checkpoint import write_random_checkpoint
from trimode import LLM, SamplingParams
from trimode.build.cpu.target import CpuTarget
from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MODES: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 16},
    {"mode": "linear_spec", "block_length": 8, "tree_width": 16},
    {"mode": "auto"},
    {"mode": "diffusion", "block_length": 8},
    {"mode": "ar", "temperature": 0.8, "seed": 5},
    {"mode": "linear_spec", "temperature": 0.8, "seed": 5},
)
LOSSLESS = (1, 2, 3)  # of MODES: they emit AR's tokens
EIGHT_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 16}
BATCH, MAX_TOKENS = 8, 48
Texts = list[list[list[int]]]  # tokens by mode and prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tiny, random = scratch / "tiny", scratch / "random"
        quantize_checkpoint(Checkpoint(ROOT / "checkpoints/tiny"), tiny, method="rtn", group=64)
        write_random_checkpoint(scratch / "bf16", **EIGHT_HEADS)
        quantize_checkpoint(Checkpoint(scratch / "bf16"), random, method="rtn", group=32, head="int4")
        rows = [
            *rows_of("shipped checkpoint", tiny, (2,), heldout(arguments.prompts)),
            *rows_of("8 KV heads, random", random, (2, 4), random_prompts(arguments.prompts)),
        ]
    print_table(rows, arguments.json)


def heldout(count: int) -> list[Any]:
    records = [json.loads(line) for line in (ROOT / "tests/data/heldout.jsonl").read_text().splitlines()]
    return [records[at]["messages"] for at in np.linspace(0, len(records) - 1, count).astype(int)]


def random_prompts(count: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.integers(101, 768, rng.integers(4, 90)).tolist() for _ in range(count)]


def rows_of(name: str, checkpoint: Path, divisions: tuple[int, ...], prompts: list[Any]) -> list[ProofRow]:
    whole, _ = texts(checkpoint, 1, prompts)
    rows = []
    for ranks in divisions:
        found, cached = texts(checkpoint, ranks, prompts)
        title = f"{name}, {ranks} ranks"
        pairs = [pair for of_mode in zip(found, whole, strict=True) for pair in zip(*of_mode, strict=True)]
        rows.append(_equality(f"{title}: {len(MODES)} modes in batches of {BATCH}, tokens of one process", pairs))
        pairs = [pair for mode in LOSSLESS for pair in zip(found[mode], found[0], strict=True)]
        rows.append(_equality(f"{title}: greedy linear_spec, trees and auto emit ar's tokens", pairs))
        rows.append(ProofRow(f"{title}: prompt tokens from the prefix cache", "some", f"{cached}", cached > 0))
    return rows


def _equality(what: str, pairs: list[tuple[list[int], list[int]]]) -> ProofRow:
    equal = sum(one == other for one, other in pairs)
    return ProofRow(what, "all", f"{equal} of {len(pairs)}", equal == len(pairs))


def texts(checkpoint: Path, ranks: int, prompts: list[Any]) -> tuple[Texts, int]:
    """The tokens of all answers, and how many prompt tokens were not computed again."""
    engine = checkpoint.parent / f"{checkpoint.name}-{ranks}"
    build_engine(Checkpoint(checkpoint), engine, target=CpuTarget(tp=ranks), capacity=512)
    found, cached = [], 0
    with LLM(engine, threads=ranks, max_batch_size=BATCH) as llm:
        for mode in MODES:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS, **mode))
            found.append([output.outputs[0].token_ids for output in outputs])
            cached += sum(output.outputs[0].counts.cached_tokens for output in outputs)
    return found, cached


if __name__ == "__main__":
    main()
