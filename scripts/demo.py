"""`make demo`: the same prompts in every mode, live, and what each mode cost."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trimode.runtime.decoding import DecodingOptions
from trimode.runtime.engine import Engine, Generation
from trimode.runtime.text_stream import TextStream

BLOCK_LENGTH = 16
MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "diffusion": {"mode": "diffusion"},
    "linear_spec, no adapter": {"mode": "linear_spec", "adapter": False},
    "linear_spec": {"mode": "linear_spec"},
}
PROMPTS = (  # problems that the training never saw
    "What is 60% of 440?",
    "Write a short story about Milo, who finds 37 stones and later 90 more.",
    "Make a JSON object: Oskar, football, Berlin, age 84.",
    "Which month is 6 months before December?",
)


@dataclass
class Totals:
    """Sums over the prompts of one mode, first tokens aside."""

    tokens: int = 0
    seconds: float = 0.0
    cycles: int = 0
    passes: int = 0

    def add(self, answer: Generation) -> None:
        self.tokens += answer.completion_tokens - 1
        self.seconds += answer.seconds
        self.cycles += answer.cycles
        self.passes += answer.passes.draft + answer.passes.commit


def main() -> None:
    engine, console = Engine(Path(sys.argv[1])), Console(highlight=False)
    console.print(f"{engine.manifest.source} on {engine.folder}, block length {BLOCK_LENGTH}, greedy")
    totals = {name: Totals() for name in MODES}
    for question in PROMPTS:
        console.rule(f"[bold]{question}", align="left")
        prompt = engine.tokenizer.encode(engine.tokenizer.apply_chat_template([{"role": "user", "content": question}]))
        for name, options in MODES.items():
            console.print(f"[cyan]{name}:[/] ", end="")
            stream = TextStream(engine.tokenizer)
            answer = engine.generate(
                prompt,
                DecodingOptions(block_length=BLOCK_LENGTH, **options),
                on_tokens=lambda tokens, stream=stream: print(stream.feed(tokens), end="", flush=True),  # type: ignore[misc]
            )
            print(stream.finish())
            totals[name].add(answer)
    table = Table("mode", "tokens a second", "tokens a forward", "tokens a cycle", title="\nAll prompts, one run")
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
