"""Tokens and pass counts of NVIDIA's own code on the shipped checkpoint: the reference's and the engine's are equal.

``tests/data/upstream_tokens.jsonl`` holds, for 13 held-out prompts, what the family's remote code returned in fp32 on a
CPU (with its attention taken from transformers' Ministral-3): the new token ids, and ``nfe`` as that code counts it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from trimode import LLM, SamplingParams
from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.model.tokenizer import Tokenizer

END_THINK = 13
RECORDS = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "upstream_tokens.jsonl").read_text().splitlines()
]
# Parameters of each kind of record; the record itself has the others.
COMMON: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar", "max_tokens": 64},
    "linear_spec": {"mode": "linear_spec", "max_tokens": 64},
    "diffusion": {"mode": "diffusion"},
    "diffusion_budget": {"mode": "diffusion"},
}
ANSWERS = {"ar": 13, "linear_spec": 39, "diffusion": 234, "diffusion_budget": 65}
# Every n-th answer of the reference, which is slow. A prompt has 18 answers of diffusion and 5 with a budget, so each
# combination of parameters is tried on several prompts.
REFERENCE_STRIDE = {"ar": 1, "linear_spec": 1, "diffusion": 5, "diffusion_budget": 2}


class Case(NamedTuple):
    """One answer of upstream's."""

    prompt: list[int]
    params: SamplingParams
    tokens: list[int]
    nfe: int


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The shipped checkpoint's own 16-bit weights, in fp32."""
    out = tmp_path_factory.mktemp("upstream") / "engine"
    build_engine(Checkpoint(tiny_checkpoint), out)
    with LLM(out) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> NemotronLabsDiffusionModel:
    return load_reference(Checkpoint(tiny_checkpoint))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_checkpoint)


def cases(tokenizer: Tokenizer, heldout: list[dict], kind: str) -> list[Case]:
    found = []
    thinking = kind == "diffusion_budget"
    for record in RECORDS:
        messages = heldout[record["heldout_line"]]["messages"]
        prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, enable_thinking=thinking))
        assert len(prompt) == record["thinking_prompt_tokens" if thinking else "prompt_tokens"]
        answers = record[kind] if isinstance(record[kind], list) else [record[kind]]
        found += [Case(prompt, params_of(kind, answer), answer["tokens"], answer["nfe"]) for answer in answers]
    assert len(found) == ANSWERS[kind]
    return found


def params_of(kind: str, answer: dict[str, Any]) -> SamplingParams:
    options = COMMON[kind] | {
        name: answer[name] for name in ("block_length", "adapter", "max_thinking_tokens") if name in answer
    }
    if kind.startswith("diffusion"):
        options["max_tokens"] = answer["max_new_tokens"]
        options |= {"denoising": "quota"} if answer["threshold"] is None else {"threshold": answer["threshold"]}
    return SamplingParams(**options)


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_reference_gives_upstreams_tokens_and_nfe(
    reference: NemotronLabsDiffusionModel, tokenizer: Tokenizer, heldout: list[dict], kind: str
) -> None:
    for case in cases(tokenizer, heldout, kind)[:: REFERENCE_STRIDE[kind]]:
        ids, params = torch.tensor([case.prompt]), case.params
        if kind == "ar":
            out, nfe = reference.ar_generate(ids, params.max_tokens)
        elif kind == "linear_spec":
            out, nfe = reference.linear_spec_generate(ids, params.max_tokens, params.block_length)
        else:
            budget = params.max_thinking_tokens
            end_think = None if budget is None else END_THINK
            out, nfe = reference.generate(
                ids,
                params.max_tokens,
                params.block_length,
                params.threshold,
                max_thinking_tokens=budget,
                end_think_token_id=end_think,
            )
        assert (out[0, len(case.prompt) :].tolist(), nfe) == (case.tokens, case.nfe), case


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_engine_gives_upstreams_tokens(llm: LLM, tokenizer: Tokenizer, heldout: list[dict], kind: str) -> None:
    """All requests in one call, so that blocks and answers of different lengths share passes."""
    wanted = cases(tokenizer, heldout, kind)
    found = llm.generate([case.prompt for case in wanted], [case.params for case in wanted])
    for case, output in zip(wanted, found, strict=True):
        assert output.outputs[0].token_ids == case.tokens, case


def test_the_engine_gives_upstreams_tokens_to_a_request_alone(
    llm: LLM, tokenizer: Tokenizer, heldout: list[dict]
) -> None:
    for kind in ANSWERS:
        for case in cases(tokenizer, heldout, kind)[::7]:
            assert llm.generate(case.prompt, case.params).outputs[0].token_ids == case.tokens, case
