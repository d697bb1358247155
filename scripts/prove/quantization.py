"""Effect of quantisation on exact match and acceptance, in every mode, on the held-out problems.

    python -m scripts.prove.quantization checkpoints/tiny awq:128 awq:64 rtn:128 awq:64:int4-head

Quantises the checkpoint by each METHOD:GROUP, with ``:int4-head`` its head too, builds the engines, and decodes
greedily. The first row is the checkpoint without quantisation. A cycle is one block: in self-speculation its draft and
the pass that verifies it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from trimode import LLM, SamplingParams
from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint

HELD_OUT = Path(__file__).resolve().parents[2] / "tests" / "data" / "heldout.jsonl"
MAX_TOKENS, BLOCK_LENGTH = 300, 16


BLOCK = {"block_length": BLOCK_LENGTH}
MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "diffusion": {"mode": "diffusion"} | BLOCK,
    "linear_spec": {"mode": "linear_spec"} | BLOCK,
    "linear_spec, no adapter": {"mode": "linear_spec", "adapter": False} | BLOCK,
}


@dataclass
class Score:
    """The results of one mode. ``exact_match``: share of answers that equal the expected text."""

    exact_match: float
    tokens_per_forward: float
    tokens_per_cycle: float


@dataclass
class Report:
    """``weight_error`` is the mean relative error of the int4 matrices."""

    weights: str
    weight_error: float
    scores: dict[str, Score]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "quantisation", nargs="*", metavar="METHOD:GROUP[:int4-head]", default=["rtn:128", "awq:128", "awq:64"]
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    reports = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ["not quantised", *arguments.quantisation]:
            folder, error = arguments.checkpoint, 0.0
            if name != "not quantised":
                folder = Path(scratch) / name
                method, group, *head = name.split(":")
                report = quantize_checkpoint(
                    Checkpoint(arguments.checkpoint),
                    folder,
                    method=method,  # type: ignore[arg-type]
                    group=int(group),
                    head="int4" if head == ["int4-head"] else "16bit",
                )
                error = statistics.fmean(report.weight_error.values())
            build_engine(Checkpoint(folder), Path(scratch) / f"{name} engine")
            with LLM(Path(scratch) / f"{name} engine") as llm:
                scores = {mode: score(llm, f"{name} {mode}", options, records) for mode, options in MODES.items()}
            reports.append(Report(name, error, scores))
    if arguments.json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
        return
    table = Table("weights", "weight error", "mode", "exact match", "tokens per forward", "tokens per cycle")
    for report in reports:
        for mode, found in report.scores.items():
            rates = (f"{found.tokens_per_forward:.2f}", f"{found.tokens_per_cycle:.2f}")
            share = f"{100 * found.exact_match:.1f} %"
            table.add_row(report.weights, f"{report.weight_error:.3f}", mode, share, *rates)
    Console().print(table)


def score(llm: LLM, name: str, options: dict[str, Any], records: list[dict[str, Any]]) -> Score:
    right = tokens = passes = cycles = 0
    for record in track(records, name, transient=True, console=Console(stderr=True)):
        prompt = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(record["messages"]))
        most = min(MAX_TOKENS, llm.manifest.limits.capacity - len(prompt))
        answer = llm.generate(prompt, SamplingParams(max_tokens=most, **options)).outputs[0]
        counts = answer.counts
        right += answer.text == record["answer"]
        tokens += answer.length - 1
        passes += counts.draft + counts.denoise + counts.commit
        cycles += counts.cycles
    return Score(right / len(records), tokens / passes, tokens / cycles)


if __name__ == "__main__":
    main()
