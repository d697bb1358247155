"""Score a checkpoint on held-out prompts with the PyTorch reference's decoding functions.

    python -m scripts.tiny.evaluate checkpoints/tiny --data tests/data/heldout.jsonl --json scores.json

Prints exact match of the whole answer in every mode, by kind and by the position at which the answer ends, and tokens a
cycle of linear self-speculation with and without the draft adapter. Every prompt is decoded with and without it, so the
confidence interval of the gain is a paired bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

from trimode.model.reference.network import NemotronLabsDiffusionModel

MAX_NEW_TOKENS = 320
BLOCKS = (8, 16, 32)
RESAMPLES = 2000


@dataclass
class Example:
    kind: str
    prompt: Tensor
    answer: str


@dataclass
class Decoded:
    tokens: list[int]
    passes: int  # without the prefill

    @property
    def cycles(self) -> int:
        """Cycles of self-speculation: a draft and a commit pass each; a last block of one token has no draft."""
        return (self.passes + 1) // 2

    @property
    def per_cycle_tokens(self) -> int:
        """Tokens that cycles emitted: all but the first, which the prefill emits."""
        return len(self.tokens) - 1


Decode = Callable[[Tensor], tuple[Tensor, int]]


def load_examples(path: Path, tokenizer: Any, limit: int | None) -> list[Example]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if limit:
        records = random.Random(0).sample(records, min(limit, len(records)))

    def example(record: dict[str, Any]) -> Example:
        text = tokenizer.apply_chat_template(record["messages"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return Example(record["kind"], prompt, record["answer"])

    return [example(record) for record in records]


def decode_all(examples: list[Example], decode: Decode, title: str) -> list[Decoded]:
    results = []
    for example in track(examples, description=f"{title:24}"):
        ids, passes = decode(example.prompt)
        results.append(Decoded(ids[0, example.prompt.shape[1] :].tolist(), passes - 1))
    return results


def pooled_rate(results: list[Decoded], chosen: list[int]) -> float:
    return sum(results[i].per_cycle_tokens for i in chosen) / max(1, sum(results[i].cycles for i in chosen))


def adapter_gain(without: list[Decoded], adapted: list[Decoded]) -> dict[str, Any]:
    """Tokens a cycle without and with the adapter; the gain, with its 95 % interval by a paired bootstrap."""
    everything, rng = list(range(len(without))), random.Random(0)
    gains = sorted(
        pooled_rate(adapted, chosen) - pooled_rate(without, chosen)
        for chosen in (rng.choices(everything, k=len(everything)) for _ in range(RESAMPLES))
    )
    plain, with_adapter = pooled_rate(without, everything), pooled_rate(adapted, everything)
    return {
        "without": plain,
        "with": with_adapter,
        "gain": with_adapter - plain,
        "interval": [gains[int(0.025 * RESAMPLES)], gains[int(0.975 * RESAMPLES)]],
        "ratio": with_adapter / plain,
    }


def groups_of(examples: list[Example], tokenizer: Any) -> dict[str, list[int]]:
    """Indices by kind, then by the position at which the answer ends, then all."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.kind].append(index)
    for index, example in enumerate(examples):
        end = example.prompt.shape[1] + len(tokenizer(example.answer)["input_ids"])
        groups["ends at 1-128" if end <= 128 else "ends at 129-256" if end <= 256 else "ends beyond 256"].append(index)
    groups["all"] = list(range(len(examples)))
    return groups


def evaluate(folder: Path, data: Path, limit: int | None) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = NemotronLabsDiffusionModel.from_pretrained(folder).float().eval()
    examples = load_examples(data, tokenizer, limit)
    runs = {"ar": decode_all(examples, lambda ids: model.ar_generate(ids, MAX_NEW_TOKENS), "AR")}
    for size in BLOCKS:
        runs[f"diffusion {size}"] = decode_all(
            examples,
            lambda ids, size=size: model.generate(ids, MAX_NEW_TOKENS, size, threshold=0.9),
            f"diffusion, block {size}",
        )
    speculations: dict[str, dict[int, list[Decoded]]] = {"without": {}, "with": {}}
    for arm, by_size in speculations.items():
        if arm == "with":
            PeftModel.from_pretrained(model, folder / "linear_spec_lora")
        for size in BLOCKS:
            by_size[size] = decode_all(
                examples,
                lambda ids, size=size: model.linear_spec_generate(ids, MAX_NEW_TOKENS, size),
                f"self-spec {arm}, block {size}",
            )
    runs["linear_spec 16"] = speculations["with"][16]

    def right(result: Decoded, example: Example) -> bool:
        end = tokenizer.eos_token_id
        return result.tokens[-1] == end and tokenizer.decode(result.tokens[:-1]) == example.answer

    correct = {mode: [right(*pair) for pair in zip(results, examples, strict=True)] for mode, results in runs.items()}
    answer_tokens = sum(len(result.tokens) for result in runs["ar"])
    return {
        "prompts": len(examples),
        "mean_new_tokens": answer_tokens / len(examples),
        "exact_match": {
            name: {"n": len(members)}
            | {mode: sum(hits[i] for i in members) / len(members) for mode, hits in correct.items()}
            for name, members in groups_of(examples, tokenizer).items()
        },
        "diffusion_tokens_a_pass": {
            size: sum(len(result.tokens) for result in results) / sum(result.passes for result in results)
            for size, results in ((size, runs[f"diffusion {size}"]) for size in BLOCKS)
        },
        "equal_to_ar": {
            f"{arm} {size}": sum(a.tokens == b.tokens for a, b in zip(results, runs["ar"], strict=True))
            for arm, by_size in speculations.items()
            for size, results in by_size.items()
        },
        "tokens_a_cycle": {
            size: adapter_gain(speculations["without"][size], speculations["with"][size]) for size in BLOCKS
        },
    }


def show(scores: dict[str, Any], console: Console) -> None:
    matches = scores["exact_match"]
    modes = [name for name in matches["all"] if name != "n"]
    table = Table(title=f"Exact match, {scores['prompts']} held-out prompts")
    for column in ("kind", "n", *modes):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for name, row in matches.items():
        table.add_row(name, str(row["n"]), *(f"{row[mode]:.0%}" for mode in modes))
    console.print(table)
    for size, gain in scores["tokens_a_cycle"].items():
        low, high = gain["interval"]
        console.print(
            f"block {size}: {gain['without']:.2f} tokens a cycle, with the adapter {gain['with']:.2f} "
            f"(+{gain['ratio'] - 1:.1%}, gain {gain['gain']:.2f} [{low:.2f}, {high:.2f}]); "
            f"diffusion {scores['diffusion_tokens_a_pass'][size]:.2f} tokens a pass"
        )
    console.print(f"answers equal to AR's, of {scores['prompts']}: {scores['equal_to_ar']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, default=Path("tests/data/heldout.jsonl"))
    parser.add_argument("--limit", type=int, help="score a random sample of this many prompts")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    arguments = parser.parse_args()
    scores = evaluate(arguments.checkpoint, arguments.data, arguments.limit)
    show(scores, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
