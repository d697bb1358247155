"""What quantisation costs in answers and in accepted drafts, in every mode, on the held-out problems.

    python scripts/quantization_report.py checkpoints/tiny awq:128 awq:64 rtn:128

Quantises the checkpoint by each METHOD:GROUP, builds the engines, and decodes greedily; the first row is the checkpoint
as it is. Tokens a cycle: what a draft and its verify pass emit together, in linear self-speculation.
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

from trimode.build.engine import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint
from trimode.runtime import LLM, CompletionOutput, SamplingParams

HELD_OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "heldout.jsonl"
MAX_TOKENS, BLOCK_LENGTH = 300, 16


@dataclass
class Score:
    """Shares of answers equal to the letter; weight_error is the mean relative error of the int4 matrices."""

    weights: str
    weight_error: float
    ar: float
    linear_spec: float
    diffusion: float
    tokens_a_cycle: float
    tokens_a_cycle_without_adapter: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("quantisation", nargs="*", metavar="METHOD:GROUP", default=["rtn:128", "awq:128", "awq:64"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    scores = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ["as it is", *arguments.quantisation]:
            folder, error = arguments.checkpoint, 0.0
            if name != "as it is":
                folder = Path(scratch) / name
                method, _, group = name.partition(":")
                report = quantize_checkpoint(
                    Checkpoint(arguments.checkpoint),
                    folder,
                    method=method,  # type: ignore[arg-type]
                    group=int(group),
                )
                error = statistics.fmean(report.weight_error.values())
            build_engine(Checkpoint(folder), Path(scratch) / f"{name} engine")
            scores.append(score(name, error, LLM(Path(scratch) / f"{name} engine"), records))
    if arguments.json:
        print(json.dumps([asdict(row) for row in scores], indent=2))
        return
    table = Table("weights", "weight error", "ar", "linear_spec", "diffusion", "tokens a cycle", "without adapter")
    for row in scores:
        shares = (f"{100 * share:.1f} %" for share in (row.ar, row.linear_spec, row.diffusion))
        cycles = (f"{row.tokens_a_cycle:.2f}", f"{row.tokens_a_cycle_without_adapter:.2f}")
        table.add_row(row.weights, f"{row.weight_error:.3f}", *shares, *cycles)
    Console().print(table)


def score(name: str, error: float, llm: LLM, records: list[dict[str, Any]]) -> Score:
    render, encode = llm.tokenizer.apply_chat_template, llm.tokenizer.encode
    prompts = [encode(render(record["messages"])) for record in records]

    def decode(**options: Any) -> list[CompletionOutput]:
        answers = []
        for prompt in track(prompts, f"{name} {options['mode']}", transient=True, console=Console(stderr=True)):
            tokens = min(MAX_TOKENS, llm.manifest.limits.capacity - len(prompt))
            answers.append(llm.generate(prompt, SamplingParams(max_tokens=tokens, **options)).outputs[0])
        return answers

    def share(answers: list[CompletionOutput]) -> float:
        return statistics.fmean(
            answer.text == record["answer"] for answer, record in zip(answers, records, strict=True)
        )

    def rate(answers: list[CompletionOutput]) -> float:
        return sum(answer.length - 1 for answer in answers) / sum(answer.counts.cycles for answer in answers)

    blocks = {"block_length": BLOCK_LENGTH}
    speculated = decode(mode="linear_spec", **blocks)
    return Score(
        weights=name,
        weight_error=error,
        ar=share(decode(mode="ar")),
        linear_spec=share(speculated),
        diffusion=share(decode(mode="diffusion", **blocks)),
        tokens_a_cycle=rate(speculated),
        tokens_a_cycle_without_adapter=rate(decode(mode="linear_spec", adapter=False, **blocks)),
    )


if __name__ == "__main__":
    main()
