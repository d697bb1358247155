"""The decoding loop: equal to the reference in all modes, and correct on scripted and random candidates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.random_checkpoint import config_fields
from trimode import LLM, SamplingParams
from trimode.model.checkpoint import Checkpoint
from trimode.model.config import ModelConfig
from trimode.model.reference.decoding import PassTotals
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.runtime.decoding.acceptance_rates import Acceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.decoding.thinking_budget import ThinkingBudget, ThinkingIds
from trimode.runtime.executor import Candidates

MASK, END, THINK, END_THINK = 100, 11, 12, 13
MODEL = ModelConfig.model_validate(config_fields())


@pytest.fixture(scope="module", params=["fp32", "int4"])
def both(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, NemotronLabsDiffusionModel]]:
    prefix = "random" if request.param == "fp32" else "random_int4"
    checkpoint: Path = request.getfixturevalue(f"{prefix}_checkpoint")
    with LLM(request.getfixturevalue(f"{prefix}_engine"), prefix_cache_bytes=0) as llm:
        yield llm, load_reference(Checkpoint(checkpoint))


def reference_tokens(
    reference: NemotronLabsDiffusionModel, prompt: list[int], params: SamplingParams
) -> tuple[list[int], PassTotals]:
    ids, common = torch.tensor([prompt]), {"max_new_tokens": params.max_tokens}
    if params.max_thinking_tokens is not None:
        common |= {"max_thinking_tokens": params.max_thinking_tokens, "end_think_token_id": END_THINK}
    if params.mode == "ar":
        out, _ = reference.ar_generate(ids, **common)
    elif params.mode == "diffusion":
        out, _ = reference.generate(
            ids,
            block_length=params.block_length,
            threshold=None if params.denoising == "quota" else params.threshold,
            steps=params.denoising_steps,
            **common,
        )
    else:
        out, _ = reference.linear_spec_generate(
            ids, block_length=params.block_length, threshold=params.draft_threshold or 0.0, **common
        )
    return out[0, len(prompt) :].tolist(), reference.passes


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "ar"},
        {"mode": "linear_spec"},
        {"mode": "linear_spec", "block_length": 5},
        {"mode": "linear_spec", "block_length": 1},
        {"mode": "linear_spec", "block_length": 8, "draft_threshold": 0.3},
        {"mode": "diffusion", "block_length": 8, "threshold": 0.9},
        {"mode": "diffusion", "block_length": 32, "threshold": 0.2},
        {"mode": "diffusion", "block_length": 16, "threshold": 1.0},
        {"mode": "diffusion", "block_length": 16, "denoising": "quota"},
        {"mode": "diffusion", "block_length": 8, "denoising": "quota", "denoising_steps": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 60, 700])
def test_greedy_tokens_and_passes_are_the_references(
    both: tuple[LLM, NemotronLabsDiffusionModel], options: dict[str, Any], length: int
) -> None:
    llm, reference = both
    prompt = np.random.default_rng(length).integers(101, 768, length).tolist()
    params = SamplingParams(max_tokens=45, **options)
    found = llm.generate(prompt, params).outputs[0]
    expected, passes = reference_tokens(reference, prompt, params)
    assert found.token_ids == expected
    chunks = -(-length // llm.manifest.limits.prefill_step)
    counts = found.counts
    assert (counts.prefill, counts.draft, counts.denoise, counts.commit) == (
        chunks,
        passes.draft,
        passes.denoise,
        passes.commit,
    )
    assert llm.stats().running == 0


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "ar"},
        {"mode": "linear_spec", "block_length": 8},
        {"mode": "diffusion", "block_length": 8, "threshold": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [0, 1, 5, 7, 13])
def test_the_thinking_budget_is_the_references(
    both: tuple[LLM, NemotronLabsDiffusionModel], options: dict[str, Any], budget: int
) -> None:
    """Text and KV cache agree after the forced token: the tokens that follow are the reference's."""
    llm, reference = both
    prompt = [*np.random.default_rng(budget).integers(101, 768, 30).tolist(), THINK]
    params = SamplingParams(max_tokens=30, max_thinking_tokens=budget, **options)
    found = llm.generate(prompt, params).outputs[0]
    expected, passes = reference_tokens(reference, prompt, params)
    assert found.token_ids == expected
    assert found.token_ids[budget] == END_THINK
    assert found.origins[budget] == "forced"
    assert (found.counts.draft, found.counts.denoise, found.counts.commit) == (
        passes.draft,
        passes.denoise,
        passes.commit,
    )


@pytest.mark.parametrize("block_length", [8, 16, 32])
@pytest.mark.parametrize("threshold", [0.5, 0.9, None])
def test_diffusions_first_tokens_do_not_depend_on_the_length_limit(
    both: tuple[LLM, NemotronLabsDiffusionModel], block_length: int, threshold: float | None
) -> None:
    """Lengths on and off the blocks' borders, alone and in one batch, against the first tokens of a longer answer."""
    llm, reference = both
    prompt = np.random.default_rng(block_length).integers(101, 768, 20).tolist()
    options: dict[str, Any] = {"mode": "diffusion", "block_length": block_length, "ignore_eos": True}
    options |= {"denoising": "quota"} if threshold is None else {"threshold": threshold}
    lengths = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 34, 63, 64, 65]
    whole, _ = reference.generate(torch.tensor([prompt]), 96, block_length, threshold, eos_token_id=-1)
    longest = whole[0, len(prompt) :].tolist()
    params = [SamplingParams(max_tokens=length, **options) for length in lengths]
    for length, output in zip(lengths, llm.generate([prompt] * len(lengths), params), strict=True):
        assert output.outputs[0].token_ids == longest[:length]
    for length, alone in list(zip(lengths, params, strict=True))[::5]:
        assert llm.generate(prompt, alone).outputs[0].token_ids == longest[:length]
        assert (
            reference.generate(torch.tensor([prompt]), length, block_length, threshold, eos_token_id=-1)[0][
                0, len(prompt) :
            ].tolist()
            == longest[:length]
        )


def test_the_last_block_is_as_long_as_the_context_has_room(both: tuple[LLM, NemotronLabsDiffusionModel]) -> None:
    llm, reference = both
    capacity = llm.manifest.limits.capacity
    prompt = np.random.default_rng(3).integers(101, 768, capacity - 20).tolist()
    params = SamplingParams(mode="diffusion", block_length=16, threshold=0.5, max_tokens=20, ignore_eos=True)
    found = llm.generate(prompt, params).outputs[0].token_ids
    reference.config.max_position_embeddings, published = capacity, reference.config.max_position_embeddings
    try:
        expected, _ = reference.generate(torch.tensor([prompt]), 20, 16, 0.5, eos_token_id=-1)
    finally:
        reference.config.max_position_embeddings = published
    assert found == expected[0, len(prompt) :].tolist()


def test_the_adapter_changes_drafts_and_nothing_else(both: tuple[LLM, NemotronLabsDiffusionModel]) -> None:
    llm, _ = both
    asked: list[tuple[bool, ...]] = []
    executor = llm._executor
    run = executor.run

    def listen(step: Any) -> Candidates:
        if hasattr(step, "adapter"):
            asked.append(tuple(step.adapter.tolist()))
        return run(step)

    prompt = list(range(110, 130))

    def answer(**options: Any) -> list[int]:
        asked.clear()
        params = SamplingParams(block_length=8, max_tokens=30, **options)
        return llm.generate(prompt, params).outputs[0].token_ids

    executor.run = listen  # type: ignore[method-assign]
    try:
        with_adapter = answer(mode="linear_spec")
        assert set(asked) == {(True,)}
        without = answer(mode="linear_spec", adapter=False)
        assert set(asked) == {(False,)}
        answer(mode="diffusion")
        assert set(asked) == {(False,)}
    finally:
        executor.run = run  # type: ignore[method-assign]
    assert with_adapter == without


@pytest.mark.parametrize(
    "law",
    [
        {"temperature": 1.2},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "presence_penalty": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_sampled_linear_spec_draws_the_tokens_that_sampled_ar_draws(
    both: tuple[LLM, NemotronLabsDiffusionModel], law: dict[str, Any]
) -> None:
    llm, _ = both
    prompt = list(range(200, 230))
    seen = set()
    for seed in range(5):
        common = {"max_tokens": 24, "seed": seed} | law
        ar, spec, auto = (
            llm.generate(prompt, SamplingParams(**common, **options)).outputs[0].token_ids
            for options in ({"mode": "ar"}, {"mode": "linear_spec", "block_length": 8}, {"mode": "auto"})
        )
        assert ar == spec == auto
        seen.add(tuple(ar))
    assert len(seen) == 5


def sequence_of(
    prompt: list[int],
    params: SamplingParams,
    budget: ThinkingBudget | None = None,
    prefill_step: int = 256,
    context: int = 1000,
) -> Sequence:
    ending = Ending(params, frozenset(MODEL.eos_token_id), budget=budget)
    return Sequence(
        prompt, params, ending, Acceptance(), context=context, mask_id=MASK, prefill_step=prefill_step, seed=0
    )


def certain(tokens: list[int]) -> Candidates:
    """Candidates that put nearly all probability on one token a row; the runner-up is 600."""
    rows = len(tokens)
    return Candidates(
        logits=np.broadcast_to(np.array([10.0, 0.0], np.float32), (rows, 2)),
        tokens=np.array([[token, 600] for token in tokens]),
        log_sum_exp=np.full(rows, 10.0, np.float32),
    )


def run_script(sequence: Sequence, script: dict[str, list[list[int]]]) -> list[str]:
    """Feed each kind of pass the tokens scripted for it; returns the kinds in order."""
    kinds = []
    while sequence.ending.finish_reason is None:
        if sequence.needs_block:
            sequence.open_block(sequence.longest_block)
        needed = sequence.next_pass()
        kinds.append(needed.kind)
        sequence.absorb(needed, certain(script[needed.kind].pop(0)[: len(needed.rows)]))
    return kinds


def test_longest_matching_run_and_one_more() -> None:
    sequence = sequence_of([200, 201], SamplingParams(mode="linear_spec", block_length=4, max_tokens=6))
    kinds = run_script(
        sequence,
        {
            "prefill": [[300]],
            "draft": [[301, 302, 303], [401, 402]],
            # Block [300, 301, 302, 303]: the second row disagrees with the draft, so two tokens come of it.
            "commit": [[301, 999, 303, 304], [401, 402, 403]],
        },
    )
    assert kinds == ["prefill", "draft", "commit", "draft", "commit"]
    assert sequence.emitted == [300, 301, 999, 401, 402, 403]
    assert sequence.origins == ["prefill", "accepted", "bonus", "accepted", "accepted", "bonus"]
    assert (sequence.counts.drafted, sequence.counts.accepted) == (5, 3)
    assert sequence.ending.finish_reason == "length"


def test_rejected_drafts_are_reported() -> None:
    sequence = sequence_of([200], SamplingParams(mode="linear_spec", block_length=4, max_tokens=9))
    for tokens in ([300], [301, 302, 303], [301, 999, 303, 304]):  # prefill, draft, commit
        if sequence.needs_block:
            sequence.open_block(4)
        sequence.absorb(sequence.next_pass(), certain(tokens))
    assert sequence.emitted == [300, 301, 999]
    assert sequence.rejected == [302, 303]


def test_an_end_token_ends_the_text_at_once() -> None:
    for mode, draft, commit in (("linear_spec", "draft", [301, END, 303, 304]), ("diffusion", "denoise", [305])):
        sequence = sequence_of([200], SamplingParams(mode=mode, block_length=4, max_tokens=9))
        kinds = run_script(sequence, {"prefill": [[300]], draft: [[301, END, 303]], "commit": [commit]})
        assert sequence.emitted == [300, 301, END]
        assert sequence.ending.finish_reason == "stop"
        assert sequence.rejected == []  # the draft after the end was not compared
        # Diffusion sees the end without a mask before it, and needs no commit.
        assert kinds == ["prefill", draft, "commit"][: 3 if mode == "linear_spec" else 2]


def test_diffusion_needs_no_commit_of_the_block_in_which_the_length_limit_lies() -> None:
    for max_tokens, kinds, emitted in (
        (3, ["prefill", "denoise"], [300, 301, 302]),
        (4, ["prefill", "denoise"], [300, 301, 302, 303]),
        (5, ["prefill", "denoise", "commit"], [300, 301, 302, 303, 304]),
        (6, ["prefill", "denoise", "commit", "denoise"], [300, 301, 302, 303, 304, 401]),
    ):
        sequence = sequence_of([200], SamplingParams(mode="diffusion", block_length=4, max_tokens=max_tokens))
        script = {"prefill": [[300]], "denoise": [[301, 302, 303], [401, 402, 403]], "commit": [[304]]}
        assert run_script(sequence, script) == kinds
        assert sequence.emitted == emitted
        assert sequence.ending.finish_reason == "length"


def thinking_in_diffusion(prompt: list[int], budget: int) -> Sequence:
    params = SamplingParams(mode="diffusion", block_length=8, max_tokens=20, max_thinking_tokens=budget)
    return sequence_of(prompt, params, ThinkingBudget(budget, ThinkingIds(THINK, END_THINK), prompt))


def test_a_thinking_budget_is_in_the_block_before_it_is_denoised() -> None:
    sequence = thinking_in_diffusion([THINK], budget=3)
    sequence.absorb(sequence.next_pass(), certain([300]))
    sequence.open_block(8)
    needed = sequence.next_pass()
    assert needed.tokens.tolist() == [300, MASK, MASK, END_THINK, MASK, MASK, MASK, MASK]
    assert needed.rows.tolist() == [1, 2, 4, 5, 6, 7]
    sequence.absorb(needed, certain([301, 302, 304, 305, 306, 307]))
    sequence.absorb(sequence.next_pass(), certain([308]))
    assert sequence.emitted == [300, 301, 302, END_THINK, 304, 305, 306, 307, 308]
    assert sequence.origins[3] == "forced"
    assert sequence.committed == 1 + 8


def test_a_thought_that_a_block_opens_is_closed_in_it() -> None:
    sequence = thinking_in_diffusion([200], budget=2)
    sequence.absorb(sequence.next_pass(), certain([300]))
    sequence.open_block(8)
    needed = sequence.next_pass()
    assert needed.tokens.tolist() == [300, *[MASK] * 7]
    sequence.absorb(needed, certain([301, THINK, 303, 304, 305, 306, 307]))
    assert sequence.next_pass().tokens.tolist() == [300, 301, THINK, 303, 304, END_THINK, 306, 307]
    sequence.absorb(sequence.next_pass(), certain([308]))
    assert sequence.emitted == [300, 301, THINK, 303, 304, END_THINK, 306, 307, 308]


def test_all_thoughts_that_a_pass_opens_are_closed() -> None:
    sequence = thinking_in_diffusion([200], budget=1)
    sequence.absorb(sequence.next_pass(), certain([300]))
    sequence.open_block(8)
    sequence.absorb(sequence.next_pass(), certain([THINK, 302, 303, THINK, 305, 306, 307]))
    assert sequence.next_pass().tokens.tolist() == [300, THINK, 302, END_THINK, THINK, 305, END_THINK, 307]


def test_a_thought_within_a_thought_does_not_renew_the_budget() -> None:
    budget = ThinkingBudget(2, ThinkingIds(THINK, END_THINK), [THINK])
    budget.take(THINK)
    assert not budget.spent
    assert budget.ends_among([THINK, THINK]) == [1]
    budget.take(300)
    assert budget.spent


def test_a_forced_token_that_was_drafted_lets_the_run_go_on() -> None:
    params = SamplingParams(mode="linear_spec", block_length=4, max_tokens=9, max_thinking_tokens=2)
    for draft, commit, emitted in (
        ([301, END_THINK, 303], [301, 302, 303, END], [300, 301, END_THINK, 303, END]),
        ([301, 302, 303], [301, 302, 303, 304], [300, 301, END_THINK]),
    ):
        sequence = sequence_of([THINK], params, ThinkingBudget(2, ThinkingIds(THINK, END_THINK), [THINK]))
        sequence.absorb(sequence.next_pass(), certain([300]))
        sequence.open_block(4)
        sequence.absorb(sequence.next_pass(), certain(draft))
        sequence.absorb(sequence.next_pass(), certain(commit))
        assert sequence.emitted == emitted
        assert sequence.committed == len(emitted)


def test_logprobs_are_the_models_own() -> None:
    params = SamplingParams(mode="linear_spec", block_length=4, max_tokens=6, logprobs=2, temperature=2.0, seed=1)
    sequence = sequence_of([200, 201], params)
    script = {"prefill": [[300]], "draft": [[301, 302, 303]] * 5, "commit": [[301, 302, 303, 304]] * 5}
    run_script(sequence, script)
    assert len(sequence.logprobs) == len(sequence.emitted)
    for token, found in zip(sequence.emitted, sequence.logprobs, strict=True):
        assert next(iter(found)) == token
        assert found[600] == (-10.0, 2)
        assert next(logprob for key, logprob in found.items() if key != 600) == (0.0, 1)


def longest_thought(emitted: list[int]) -> int:
    """Most tokens behind an open ``<think>``; the prompt has opened it."""
    longest, thought, opened = 0, 0, True
    for token in emitted:
        if opened and token != END_THINK:
            thought += 1
            longest = max(longest, thought)
        elif opened:
            opened = False
        elif token == THINK:
            thought, opened = 0, True
    return longest


@settings(max_examples=200, deadline=None)
@example(
    mode="diffusion",
    block_length=8,
    max_tokens=8,
    threshold=0.0,
    denoising="quota",
    budget=1,
    prompt=11,
    room=0,
    seed=0,
)
@given(
    mode=st.sampled_from(["auto", "ar", "diffusion", "linear_spec"]),
    block_length=st.integers(1, 9),
    max_tokens=st.integers(1, 20),
    threshold=st.sampled_from([0.0, 0.5, 1.0]),
    denoising=st.sampled_from(["threshold", "quota", "top_n", "factor", "product"]),
    budget=st.one_of(st.none(), st.integers(0, 6)),
    prompt=st.integers(1, 12),
    room=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_invariants_hold_for_any_candidates(
    mode: Any,
    block_length: int,
    max_tokens: int,
    threshold: float,
    denoising: Any,
    budget: int | None,
    prompt: int,
    room: int,
    seed: int,
) -> None:
    """Random candidates: the length limit holds, no mask is emitted, and committed rows belong to the text's tokens."""
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"mode": mode, "max_tokens": max_tokens, "max_thinking_tokens": budget}
    if mode != "ar":
        options["block_length"] = block_length
    if mode == "linear_spec":
        options["draft_threshold"] = threshold
    if mode == "diffusion":
        options["denoising"] = denoising
        options |= {"denoising_top_n": 2} if denoising == "top_n" else {}
        options |= {"threshold": threshold} if denoising in ("threshold", "factor", "product") else {}
    params = SamplingParams(**options)
    ids = ThinkingIds(THINK, END_THINK)
    text = [200] * (prompt - 1) + [THINK]
    thinking = None if budget is None else ThinkingBudget(budget, ids, text)
    context = prompt + max_tokens + room
    sequence = sequence_of(text, params, thinking, prefill_step=5, context=context)
    assert sequence.kv_rows == min(context, params.kv_rows(prompt))
    rows: dict[int, int] = {}  # KV row -> the token it was computed from, by the causal passes
    while sequence.ending.finish_reason is None:
        if sequence.needs_block:
            shortest = sequence.longest_block if mode == "diffusion" else 1
            sequence.open_block(int(rng.integers(shortest, sequence.longest_block + 1)))
        needed = sequence.next_pass()
        assert sequence.committed + len(needed.tokens) <= sequence.kv_rows <= context
        if needed.kind in ("prefill", "commit"):
            rows |= {sequence.committed + place: token for place, token in enumerate(needed.tokens.tolist())}
        count = len(needed.rows)
        sequence.absorb(
            needed,
            Candidates(
                logits=-np.sort(rng.exponential(size=(count, 3)).astype(np.float32), axis=-1),
                tokens=rng.permuted(np.tile([END, THINK, END_THINK, *range(101, 123)], (count, 1)), axis=-1)[:, :3],
                log_sum_exp=np.full(count, 1.0, np.float32),
            ),
        )
        known = sequence.tokens
        assert sequence.committed <= len(known)
        assert [rows[row] for row in range(sequence.committed)] == known[: sequence.committed]
    emitted = sequence.emitted
    assert 1 <= len(emitted) <= max_tokens
    assert len(sequence.origins) == len(emitted)
    assert MASK not in emitted
    assert END not in emitted[:-1]
    assert sequence.ending.finish_reason == ("stop" if emitted[-1] == END else "length")
    assert sequence.ending.finish_reason == "stop" or len(emitted) == max_tokens
    if budget is not None:
        assert longest_thought(emitted) <= budget
