"""`make demo`: stream the answers to four prompts in every mode, and print the speed of each mode."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trimode import LLM, CompletionOutput, SamplingParams

BLOCK_LENGTH = 16
MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "diffusion": {"mode": "diffusion", "block_length": BLOCK_LENGTH},
    "linear_spec, no adapter": {"mode": "linear_spec", "block_length": BLOCK_LENGTH, "adapter": False},
    "linear_spec": {"mode": "linear_spec", "block_length": BLOCK_LENGTH},
    "auto": {"mode": "auto"},
}
PROMPTS = (  # not in the training data
    "What is 60% of 440?",
    "Write a short story about Milo, who finds 37 stones and later 90 more.",
    "Make a JSON object: Oskar, football, Berlin, age 84.",
    "Which month is 6 months before December?",
)


@dataclass
class Totals:
    """Sums over the prompts of one mode, without the first tokens, which the prefill gives."""

    tokens: int = 0
    seconds: float = 0.0
    cycles: int = 0
    passes: int = 0

    def add(self, answer: CompletionOutput) -> None:
        counts = answer.counts
        self.tokens += answer.length - 1
        self.seconds += answer.seconds or 0.0
        self.cycles += counts.cycles
        self.passes += counts.draft + counts.denoise + counts.commit


def main() -> None:
    folder, console = Path(sys.argv[1]), Console(highlight=False)
    llm = LLM(folder, max_batch_size=1, prefix_cache_bytes=0)
    console.print(f"{llm.manifest.source} on {folder}, block length {BLOCK_LENGTH}, greedy")
    totals = {name: Totals() for name in MODES}
    for question in PROMPTS:
        console.rule(f"[bold]{question}", align="left")
        for name, options in MODES.items():
            console.print(f"[cyan]{name}:[/] ", end="")
            answer = llm.generate_async(
                [{"role": "user", "content": question}], SamplingParams(max_tokens=256, **options), streaming=True
            )
            for update in answer:
                print(update.outputs[0].text_diff, end="", flush=True)
            print()
            totals[name].add(answer.outputs[0])
    llm.shutdown()
    table = Table("mode", "tokens per second", "tokens per forward", "tokens per cycle", title="\nAll prompts, one run")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, total in totals.items():
        table.add_row(
            name,
            f"{total.tokens / total.seconds:.0f}",
            f"{total.tokens / total.passes:.2f}",
            f"{total.tokens / total.cycles:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
