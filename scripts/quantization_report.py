"""What quantisation costs in answers and in accepted drafts, with the PyTorch reference's own decoding functions.

    python scripts/quantization_report.py checkpoints/tiny quantized/rtn quantized/awq --prompts 64 --json report.json

Each folder is decoded in float32 arithmetic (int4 weights unpacked), in every mode, on the same held-out prompts.
Tokens a cycle: what a draft and its verify pass emit together, in linear self-speculation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import logging as transformers_logging

from trimode.model.checkpoint import Checkpoint
from trimode.model.loading import load_reference
from trimode.model.reference import NemotronLabsDiffusionModel
from trimode.model.tokenizer import Tokenizer
from trimode.quantize.report import REPORT_FILE, QuantizationReport

HELD_OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "heldout.jsonl"
MAX_NEW_TOKENS = 320
DIFFUSION_THRESHOLD = 0.9  # the model card's

Decode = Callable[[Tensor], tuple[Tensor, int]]


@dataclass
class Score:
    """One mode of one checkpoint."""

    weights: str
    mode: str
    exact_match: float
    tokens_per_pass: float
    tokens_per_cycle: float | None  # of linear self-speculation


def modes(model: NemotronLabsDiffusionModel) -> Iterator[tuple[str, Decode]]:
    """Each mode with its decoding function; self-speculation drafts with the adapter if one is attached."""
    yield "ar", lambda ids: model.ar_generate(ids, MAX_NEW_TOKENS)
    yield "diffusion", lambda ids: model.generate(ids, MAX_NEW_TOKENS, threshold=DIFFUSION_THRESHOLD)
    yield "linear_spec", lambda ids: model.linear_spec_generate(ids, MAX_NEW_TOKENS)


def score(weights: str, mode: str, decode: Decode, examples: list[dict[str, Any]], tokenizer: Tokenizer) -> Score:
    matches = emitted = passes = 0
    for example in track(examples, description=f"{weights:8} {mode:22}", console=Console(stderr=True)):
        prompt = torch.tensor([tokenizer.encode(tokenizer.apply_chat_template(example["messages"]))])
        ids, made = decode(prompt)
        answer = ids[0, prompt.shape[1] :].tolist()
        matches += tokenizer.decode(answer).strip() == example["answer"].strip()
        # The prefill pass gives the first token; what follows is the cycles' work.
        emitted, passes = emitted + len(answer) - 1, passes + made - 1
    per_pass = emitted / max(passes, 1)
    per_cycle = 2 * per_pass if mode.startswith("linear_spec") else None  # a cycle is a draft pass and a verify pass
    return Score(weights, mode, matches / len(examples), per_pass, per_cycle)


def name_of(checkpoint: Checkpoint) -> str:
    """``fp32`` for the unquantised weights as they run here; else the method, with the head if that is int4 too."""
    if checkpoint.quantization is None:
        return "fp32"
    report = QuantizationReport.model_validate_json((checkpoint.folder / REPORT_FILE).read_text(encoding="utf-8"))
    return report.method + ("+head" if report.head == "int4" else "")


def evaluate(folder: Path, examples: list[dict[str, Any]]) -> list[Score]:
    checkpoint = Checkpoint(folder)
    tokenizer, weights = Tokenizer.from_folder(folder), name_of(checkpoint)
    model = load_reference(checkpoint, adapter=False)
    scores = [score(weights, mode, decode, examples, tokenizer) for mode, decode in modes(model)]
    if checkpoint.adapter is not None:
        adapted = dict(modes(load_reference(checkpoint)))["linear_spec"]
        scores.append(score(weights, "linear_spec + adapter", adapted, examples, tokenizer))
    return scores


def spread(path: Path, count: int) -> list[dict[str, Any]]:
    """``count`` examples from all over the file, which is sorted by kind."""
    examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    count = min(count, len(examples))
    return [examples[index * len(examples) // count] for index in range(count)]


def table(scores: list[Score], prompts: int) -> Table:
    shown = Table(
        "weights", "mode", "exact match", "tokens a pass", "tokens a cycle", title=f"{prompts} held-out prompts"
    )
    for line in scores:
        cycle = "-" if line.tokens_per_cycle is None else f"{line.tokens_per_cycle:.2f}"
        shown.add_row(line.weights, line.mode, f"{line.exact_match:.1%}", f"{line.tokens_per_pass:.2f}", cycle)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a checkpoint and its quantised folders"
    )
    parser.add_argument("--data", type=Path, default=HELD_OUT, help="JSONL of messages and answer")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the scores here too")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    examples = spread(arguments.data, arguments.prompts)
    scores = [line for folder in arguments.folders for line in evaluate(folder, examples)]
    Console().print(table(scores, len(examples)))
    if arguments.json:
        content = {"prompts": len(examples), "scores": [asdict(line) for line in scores]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
