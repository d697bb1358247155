"""An answer that another process began continues with the tokens that this process would have emitted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimode import LLM, GuidedDecodingParams, SamplingParams
from trimode.common.errors import TriModeError

PROMPT = "<|im_start|>user\nCompute 47 * 36 step by step.<|im_end|>\n<|im_start|>assistant\n"
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module")
def llm(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, threads=1, prefix_cache_bytes=0) as llm:
        yield llm


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "ar"},
        {"mode": "ar", **SAMPLED, "presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"mode": "ar", "repetition_penalty": 1.2, "max_thinking_tokens": 3},
        {"mode": "linear_spec", "block_length": 8},
        {"mode": "linear_spec", "lookup": True, **SAMPLED},
        {"mode": "linear_spec", "tree_width": 12, "frequency_penalty": 0.5},
        {"mode": "linear_spec", "draft_threshold": 0.5, "stop": "carry 1"},
        {"mode": "linear_spec", "bad": ["carry"], "min_tokens": 30},
        {"mode": "linear_spec", "guided_decoding": GuidedDecodingParams(regex=r"[a-z]{3}( [0-9]{2,4}){8} end")},
        {"mode": "auto", **SAMPLED, "logprobs": 2},
        {"mode": "auto", "presence_penalty": 0.4},
    ],
    ids=str,
)
def test_a_continued_answer_is_the_whole_one_wherever_it_was_cut(llm: LLM, options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=40, **options)
    prompt = llm.tokenizer.encode(PROMPT, add_special_tokens=False)
    whole = llm.generate(prompt, params).outputs[0]
    assert whole.length > 4
    for cut in (1, whole.length // 2, whole.length - 1):
        found = llm.generate(_cut(prompt, whole.token_ids, cut), params).outputs[0]
        assert (found.token_ids, found.text) == (whole.token_ids, whole.text)
        assert (found.finish_reason, found.stop_reason) == (whole.finish_reason, whole.stop_reason)
        assert found.origins[:cut] == ["forced"] * cut
        if whole.logprobs is not None and found.logprobs is not None:
            assert found.logprobs[:cut] == [{}] * cut
            assert [*found.logprobs[cut]] == [*whole.logprobs[cut]]


@pytest.mark.parametrize(
    "options",
    [
        {"block_length": 8, "threshold": 0.8},
        {"block_length": 8, "denoising": "quota", "denoising_steps": 3, **SAMPLED},
        {"block_length": 16, "max_thinking_tokens": 5},
    ],
    ids=str,
)
def test_diffusion_continues_where_a_block_ended(llm: LLM, options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=60, mode="diffusion", ignore_eos=True, **options)
    prompt = llm.tokenizer.encode(PROMPT, add_special_tokens=False)
    whole = llm.generate(prompt, params).outputs[0]
    for blocks in (0, 1, 2):
        cut = 1 + blocks * options["block_length"]
        found = llm.generate(_cut(prompt, whole.token_ids, cut), params).outputs[0]
        assert (found.token_ids, found.text) == (whole.token_ids, whole.text)
        assert found.origins[:cut] == ["forced"] * cut
    with pytest.raises(TriModeError, match="do not end where a block of mode diffusion ends"):
        llm.generate(_cut(prompt, whole.token_ids, 2), params)


def test_the_begun_tokens_as_a_part_of_the_prompt_would_give_another_answer(llm: LLM) -> None:
    """Why a continuation needs to know what was emitted: presence and frequency penalties leave out the prompt."""
    params = SamplingParams(max_tokens=40, mode="ar", presence_penalty=0.7, frequency_penalty=0.7, ignore_eos=True)
    prompt = llm.tokenizer.encode(PROMPT, add_special_tokens=False)
    whole = llm.generate(prompt, params).outputs[0]
    rest = llm.generate([*prompt, *whole.token_ids[:20]], SamplingParams(**vars(params) | {"max_tokens": 20}))
    assert rest.outputs[0].token_ids != whole.token_ids[20:]


def test_replayed_tokens_take_one_pass_a_token_in_ar_and_one_a_block_in_speculation(llm: LLM) -> None:
    prompt = llm.tokenizer.encode(PROMPT, add_special_tokens=False)
    modes: tuple[tuple[dict[str, Any], int], ...] = (
        ({"mode": "ar"}, 31),
        ({"mode": "linear_spec", "block_length": 8}, 4),
    )
    for mode, passes in modes:
        params = SamplingParams(max_tokens=32, ignore_eos=True, **mode)
        whole = llm.generate(prompt, params).outputs[0]
        found = llm.generate(_cut(prompt, whole.token_ids, 31), params).outputs[0]
        assert (found.counts.commit, found.counts.draft, found.counts.drafted) == (passes, 0, 0)


@pytest.mark.parametrize("options", [{"mode": "ar"}, {"mode": "linear_spec"}, {"mode": "auto", **SAMPLED}], ids=str)
def test_begun_tokens_stay_where_the_model_would_have_chosen_others(llm: LLM, options: dict[str, Any]) -> None:
    """As after a move to a machine that rounds differently."""
    begun = llm.tokenizer.encode("Ones: 1x1=7, carry 8.", add_special_tokens=False)
    prompt = llm.tokenizer.encode(PROMPT, add_special_tokens=False)
    params = SamplingParams(max_tokens=len(begun) + 12, ignore_eos=True, **options)
    found = llm.generate(_cut(prompt, begun, len(begun)), params).outputs[0]
    assert found.token_ids[: len(begun)] == begun
    assert found.length == len(begun) + 12


def test_what_cannot_be_continued_is_refused(llm: LLM) -> None:
    record = {"prompt_token_ids": [1, 2], "answer_token_ids": [3, 4]}
    with pytest.raises(TriModeError, match="answer_token_ids has 2 tokens and max_tokens"):
        llm.generate(record, SamplingParams(max_tokens=2))
    with pytest.raises(TriModeError, match="only one answer can be continued"):
        llm.generate(record, SamplingParams(max_tokens=9, n=2, temperature=1.0))
    with pytest.raises(TriModeError, match="answer token 99999 is outside"):
        llm.generate({**record, "answer_token_ids": [99999]}, SamplingParams(max_tokens=9))


def _cut(prompt: list[int], answer: list[int], tokens: int) -> dict[str, Any]:
    return {"prompt_token_ids": prompt, "answer_token_ids": answer[:tokens]}
