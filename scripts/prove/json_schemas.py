"""Answer under drawn JSON schemas in modes ar, linear_spec and auto, and compare with masked AR by the reference.

    python -m scripts.prove.json_schemas engines/tiny-cpu engines/tiny-w4a16-awq64

The schemas are drawn by tests/support/drawn_schemas.py: nesting, enums, patterns, arrays, optional keys, unions, bounds
and Unicode. They are unlike the training data of the checkpoint: few drafts are right. Rows "trained task" have prompts
of the training data that ask for JSON, and their schema. Speeds are of single requests, one after the other,
by the processor time of the process behind the first token, with one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import torch
from rich.console import Console
from rich.progress import track

from scripts.prove.proof_table import ProofRow, print_table
from scripts.tiny.corpus import make_json
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
_LONGEST_PERSON = 80  # tokens


class Speed(NamedTuple):
    """Of all answers, behind their first tokens."""

    tokens: int
    passes: int
    cycles: int
    seconds: float


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
    with LLM(arguments.engine, threads=1, prefix_cache_bytes=0) as llm:
        found = rows(llm, arguments.checkpoint, schemas, arguments.max_tokens)
        print_table(found + trained_rows(llm, arguments.schemas), arguments.json)


def rows(llm: LLM, checkpoint: Path, schemas: list[Schema], max_tokens: int) -> list[ProofRow]:
    expected = reference_answers(llm, checkpoint, schemas, max_tokens)
    prompts = [prompt_of(llm, schema) for schema in schemas]
    found, speeds = [], {}
    for mode in MODES:
        name = mode["mode"]
        answers, speeds[name] = answer_all(llm, prompts, schemas, max_tokens, **mode)
        ended = [index for index, answer in enumerate(answers) if answer.finish_reason == "stop"]
        valid = [index for index in ended if validates(answers[index].text, schemas[index])]
        other = [index for index, answer in enumerate(answers) if answer.token_ids != expected[index]]
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
    _, speeds["free"] = answer_all(llm, prompts, None, max_tokens, **MODES[1])
    return [*found, *speed_rows("drawn schemas", speeds)]


def trained_rows(llm: LLM, count: int) -> list[ProofRow]:
    """The checkpoint's own task: facts about a person as JSON."""
    draw = random.Random(5)
    chats = [[{"role": "user", "content": make_json(draw).prompt}] for _ in range(count)]
    prompts = [llm.tokenizer.encode(llm.tokenizer.apply_chat_template(chat)) for chat in chats]
    kinds = {"name": "string", "age": "integer", "city": "string", "hobby": "string"}
    properties = {name: {"type": kind} for name, kind in kinds.items()}
    schema = {"type": "object", "properties": properties, "required": list(kinds), "additionalProperties": False}
    speeds = {mode["mode"]: answer_all(llm, prompts, [schema] * count, _LONGEST_PERSON, **mode)[1] for mode in MODES}
    _, speeds["free"] = answer_all(llm, prompts, None, _LONGEST_PERSON, **MODES[1])
    return speed_rows("trained task", speeds)


def speed_rows(name: str, speeds: dict[str, Speed]) -> list[ProofRow]:
    """speeds: of the constrained modes by name, and of linear_spec without grammar as ``free``."""

    def listed(values: dict[str, float]) -> str:
        return "; ".join(f"{name} {value:.2f}" for name, value in values.items())

    rates = {mode: speed.tokens / speed.seconds for mode, speed in speeds.items()}
    cycles = {mode: speed.tokens / speed.cycles for mode, speed in speeds.items()}
    passes = {mode: speed.passes / speed.tokens for mode, speed in speeds.items()}
    spec = rates["linear_spec"]
    return [
        ProofRow(f"{name}: tokens a second of processor time", "", listed(rates), None),
        ProofRow(f"{name}: linear_spec against ar, constrained", ">= 2.0", f"{spec / rates['ar']:.2f}", None),
        ProofRow(f"{name}: linear_spec constrained against free", ">= 0.9", f"{spec / rates['free']:.2f}", None),
        ProofRow(f"{name}: tokens a cycle", "", listed(cycles), None),
        ProofRow(f"{name}: passes a token", "", listed(passes), None),
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
    llm: LLM, prompts: list[list[int]], schemas: list[Schema] | None, max_tokens: int, **mode: Any
) -> tuple[list[CompletionOutput], Speed]:
    """schemas: of the answers, None for free text."""
    answers: list[CompletionOutput] = []
    tokens, passes, cycles, seconds = 0, 0, 0, 0.0
    for number, prompt in enumerate(track(prompts, str(mode), transient=True, console=Console(stderr=True))):
        guided = None if schemas is None else GuidedDecodingParams(json=schemas[number])
        if guided is not None:
            llm.compile_grammar(guided)
        params = SamplingParams(max_tokens=max_tokens, guided_decoding=guided, **mode)
        begun = None
        for update in llm.generate_async(prompt, params, streaming=True):
            begun = time.process_time() if begun is None else begun
            answer = update.outputs[0]
        seconds += time.process_time() - (begun or 0.0)
        tokens, cycles = tokens + answer.length - 1, cycles + answer.counts.cycles
        passes += answer.counts.draft + answer.counts.commit
        answers.append(answer)
    return answers, Speed(tokens, passes, cycles, seconds)


def validates(text: str, schema: Schema) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


if __name__ == "__main__":
    main()
