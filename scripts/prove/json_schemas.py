"""Answer under drawn JSON schemas in modes ar, linear_spec and auto, and compare with masked AR by the reference.

    python -m scripts.prove.json_schemas engines/tiny-cpu checkpoints/tiny-w4a16

The schemas are drawn by tests/support/drawn_schemas.py: nesting, enums, patterns, arrays, optional keys, unions, bounds
and Unicode. Speeds are of single requests, one after the other.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import torch
from rich.console import Console
from rich.progress import track

from scripts.prove.proof_table import ProofRow, print_table
from tests.support.drawn_schemas import Schema, drawn_schema
from tests.support.masked_ar import masked_ar
from trimode import LLM, CompletionOutput, GuidedDecodingParams, SamplingParams
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference

MODES: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 16},
    {"mode": "auto"},
)
_MOST_SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("checkpoint", type=Path, help="what the engine was built from")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    schemas = [drawn_schema(seed) for seed in range(arguments.schemas)]
    with LLM(arguments.engine, prefix_cache_bytes=0) as llm:
        print_table(rows(llm, arguments.checkpoint, schemas, arguments.max_tokens), arguments.json)


def rows(llm: LLM, checkpoint: Path, schemas: list[Schema], max_tokens: int) -> list[ProofRow]:
    expected = reference_answers(llm, checkpoint, schemas, max_tokens)
    found, seconds, cycles = [], {}, {}
    for mode in MODES:
        name = mode["mode"]
        answers, seconds[name] = answer_all(llm, schemas, max_tokens, constrained=True, **mode)
        ended = [index for index, answer in enumerate(answers) if answer.finish_reason == "stop"]
        valid = [index for index in ended if validates(answers[index].text, schemas[index])]
        other = [index for index, answer in enumerate(answers) if answer.token_ids != expected[index]]
        cycles[name] = tokens_a_cycle(answers)
        share = len(ended) / len(answers)
        found += [
            ProofRow(f"{name}: answers that end within {max_tokens} tokens", ">= 90 %", f"{share:.1%}", share >= 0.9),
            ProofRow(f"{name}: ended answers that validate", "all", f"{len(valid)} of {len(ended)}", valid == ended),
            ProofRow(
                f"{name}: answers equal to masked AR by the reference",
                "all",
                f"{len(answers) - len(other)} of {len(answers)}" + (f"; seeds {other[:_MOST_SHOWN]}" if other else ""),
                not other,
            ),
        ]
    free, seconds["free"] = answer_all(llm, schemas, max_tokens, constrained=False, **MODES[1])
    speed = {name: tokens / of_all for name, (tokens, of_all) in seconds.items()}
    shown = "; ".join(f"{name} {value:.0f}" for name, value in speed.items())
    per_cycle = "; ".join(f"{name} {value:.2f}" for name, value in cycles.items())
    return [
        *found,
        ProofRow("tokens a second: constrained modes, and linear_spec without grammar (free)", "", shown, None),
        ProofRow("linear_spec against ar, constrained", ">= 2.0", f"{speed['linear_spec'] / speed['ar']:.2f}", None),
        ProofRow("linear_spec constrained against free", ">= 0.9", f"{speed['linear_spec'] / speed['free']:.2f}", None),
        ProofRow("tokens a cycle", "", f"{per_cycle}; free {tokens_a_cycle(free):.2f}", None),
    ]


def prompt_of(llm: LLM, schema: Schema) -> list[int]:
    text = "Answer in JSON by this schema: " + json.dumps(schema, ensure_ascii=False)
    return llm.tokenizer.encode(llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]))


def reference_answers(llm: LLM, checkpoint: Path, schemas: list[Schema], max_tokens: int) -> list[list[int]]:
    reference, model = load_reference(Checkpoint(checkpoint)), llm.manifest.model
    answers = []
    for schema in track(schemas, "masked AR by the reference", transient=True, console=Console(stderr=True)):
        grammar = llm._grammars.compile(GuidedDecodingParams(json=schema))
        prompt, ends = prompt_of(llm, schema), model.eos_token_id
        answers.append(masked_ar(reference, prompt, grammar, max_tokens, ends, mask_id=model.mask_token_id))
    return answers


def answer_all(
    llm: LLM, schemas: list[Schema], max_tokens: int, *, constrained: bool, **mode: Any
) -> tuple[list[CompletionOutput], tuple[int, float]]:
    """The answers, and the tokens and seconds of all of them behind their first tokens."""
    answers, tokens, seconds = [], 0, 0.0
    for schema in track(schemas, str(mode), transient=True, console=Console(stderr=True)):
        guided = GuidedDecodingParams(json=schema) if constrained else None
        if guided is not None:
            llm.compile_grammar(guided)
        params = SamplingParams(max_tokens=max_tokens, guided_decoding=guided, **mode)
        begun = time.perf_counter()
        answer = llm.generate(prompt_of(llm, schema), params).outputs[0]
        of_first = answer.time_to_first_token or 0.0
        seconds += time.perf_counter() - begun - of_first
        tokens += answer.length - 1
        answers.append(answer)
    return answers, (tokens, seconds)


def tokens_a_cycle(answers: list[CompletionOutput]) -> float:
    return sum(answer.length - 1 for answer in answers) / max(1, sum(answer.counts.cycles for answer in answers))


def validates(text: str, schema: Schema) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


if __name__ == "__main__":
    main()
