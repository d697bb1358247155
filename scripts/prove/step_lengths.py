"""Measure how much the AR engine's logits depend on the length of the step, and whether a greedy token could change.

Self-speculation verifies a block in one pass; AR computes its tokens one by one. Both choose from causal rows, so they
emit the same text, unless a kernel rounds differently in a longer step and two logits are nearly equal. Held-out
prompts are answered token by token. Then the same tokens are computed in longer steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimode.engine.files import TOKENIZER
from trimode.engine.manifest import Manifest
from trimode.model.tokenizer import Tokenizer
from trimode.runtime.cpu.cpu_executor import CpuExecutor
from trimode.runtime.executor import Candidates, CausalStep

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--step", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    manifest = Manifest.read(arguments.engine)
    executor = CpuExecutor(arguments.engine, manifest)
    tokenizer = Tokenizer.from_folder(arguments.engine / TOKENIZER)
    records = [json.loads(line) for line in (ROOT / "tests/data/heldout.jsonl").read_text().splitlines()]
    singly, together = [], []
    for record in records:
        prompt = tokenizer.encode(tokenizer.apply_chat_template(record["messages"]))
        slot = executor.pool.acquire()
        pending_token = prefill(executor, slot, prompt, manifest.limits.prefill_step)
        answer, rows = greedy(
            executor, slot, len(prompt), pending_token, arguments.max_tokens, manifest.model.eos_token_id
        )
        singly.append(rows)
        together.append(causal_rows(executor, slot, len(prompt), answer, arguments.step))
        executor.pool.release(slot)
    report(np.concatenate(singly), np.concatenate(together), arguments.step)


def prefill(executor: CpuExecutor, slot: int, prompt: list[int], chunk: int) -> int:
    """The first token of the answer."""
    for begin in range(0, len(prompt), chunk):
        ids = np.array([prompt[begin : begin + chunk]])
        found = executor.run(CausalStep.chain(slot, ids, np.array([begin]), np.array([[ids.shape[1] - 1]])))
    return int(found.tokens[0, 0, 0])


def greedy(
    executor: CpuExecutor, slot: int, committed: int, pending_token: int, longest: int, ends: tuple[int, ...]
) -> tuple[list[int], NDArray[np.float64]]:
    """Greedy decoding in steps of one token. Returns the input token of each step, and :func:`best_two` of its row."""
    tokens, rows = [pending_token], []
    while tokens[-1] not in ends and len(tokens) < longest:
        at = np.array([committed + len(tokens) - 1])
        found = executor.run(CausalStep.chain(slot, np.array([tokens[-1:]]), at, np.array([[0]])))
        rows.append(best_two(found))
        tokens.append(int(found.tokens[0, 0, 0]))
    return tokens[:-1], np.concatenate(rows)


def causal_rows(executor: CpuExecutor, slot: int, committed: int, tokens: list[int], step: int) -> NDArray[np.float64]:
    rows = []
    for begin in range(0, len(tokens), step):
        ids = np.array([tokens[begin : begin + step]])
        every = np.arange(ids.shape[1])[None]
        rows.append(best_two(executor.run(CausalStep.chain(slot, ids, np.array([committed + begin]), every))))
    return np.concatenate(rows)


def best_two(found: Candidates) -> NDArray[np.float64]:
    """[rows, 4]: the best token, its logit, the second one's, the log-sum-exp."""
    columns = (found.tokens[0, :, 0], found.logits[0, :, 0], found.logits[0, :, 1], found.log_sum_exp[0])
    return np.stack([column.astype(np.float64) for column in columns], axis=1)


def report(singly: NDArray[np.float64], together: NDArray[np.float64], step: int) -> None:
    differences = np.abs(singly - together)
    logits, sums = differences[:, 1:3].max(axis=1), differences[:, 3]
    margins = singly[:, 1] - singly[:, 2]
    flips = int((singly[:, 0] != together[:, 0]).sum())
    print(f"{len(singly)} rows in steps of 1 and of {step}")
    print(f"rows whose logits differ: {(logits > 0).mean():.2%}, by {logits.max():.1e} at most")
    print(f"rows whose log-sum-exp differs: {(sums > 0).mean():.2%}, by {sums.max():.1e} at most")
    print(f"margin of the best token: {margins.min():.1e} at least, below 1e-3 in {(margins < 1e-3).mean():.3%}")
    print(f"rows whose margin is within their difference: {int((margins <= 2 * logits).sum())}; flips: {flips}")


if __name__ == "__main__":
    main()
