"""The decoding loop: the reference's tokens in all modes, and its rules on hand-made candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.random_checkpoint import config_fields
from trimode.model.checkpoint import Checkpoint
from trimode.model.config import ModelConfig
from trimode.model.errors import TriModeError
from trimode.model.loading import load_reference
from trimode.model.reference import NemotronLabsDiffusionModel
from trimode.runtime.decoding import DecodingOptions, Sequence
from trimode.runtime.engine import Engine
from trimode.runtime.executor import Candidates

MASK, END = 100, 11
MODEL = ModelConfig.model_validate(config_fields())


@pytest.fixture(scope="module", params=["fp32", "int4"])
def both(request: pytest.FixtureRequest) -> tuple[Engine, NemotronLabsDiffusionModel]:
    prefix = "random" if request.param == "fp32" else "random_int4"
    checkpoint: Path = request.getfixturevalue(f"{prefix}_checkpoint")
    return Engine(request.getfixturevalue(f"{prefix}_engine")), load_reference(Checkpoint(checkpoint))


def reference_tokens(reference: NemotronLabsDiffusionModel, prompt: list[int], options: DecodingOptions) -> tuple:
    ids, common = torch.tensor([prompt]), {"max_new_tokens": options.max_tokens}
    if options.mode == "ar":
        out, passes = reference.ar_generate(ids, **common)
    elif options.mode == "diffusion":
        out, passes = reference.generate(ids, block_length=options.block_length, threshold=options.threshold, **common)
    else:
        out, passes = reference.linear_spec_generate(
            ids, block_length=options.block_length, threshold=options.draft_threshold, **common
        )
    return out[0, len(prompt) :].tolist(), passes


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
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 60, 700])
def test_greedy_tokens_and_passes_are_the_references(
    both: tuple[Engine, NemotronLabsDiffusionModel], options: dict[str, Any], length: int
) -> None:
    engine, reference = both
    prompt = np.random.default_rng(length).integers(101, 768, length).tolist()
    decoding = DecodingOptions(max_tokens=45, **options)
    found = engine.generate(prompt, decoding)
    expected, passes = reference_tokens(reference, prompt, decoding)
    assert found.token_ids == expected
    chunks = -(-length // engine.manifest.limits.prefill_step)
    assert (found.passes.prefill, found.passes.draft + found.passes.commit) == (chunks, passes - 1)
    assert engine.executor.pool.active == 0


def test_the_adapter_changes_drafts_and_nothing_else(both: tuple[Engine, NemotronLabsDiffusionModel]) -> None:
    engine, _ = both
    asked: list[tuple[bool, ...]] = []
    run = engine.executor.run

    def listen(step: Any) -> Candidates:
        if hasattr(step, "adapter"):
            asked.append(tuple(step.adapter.tolist()))
        return run(step)

    engine.executor.run = listen  # type: ignore[method-assign]
    try:
        prompt = list(range(110, 130))
        with_adapter = engine.generate(prompt, DecodingOptions(mode="linear_spec", block_length=8, max_tokens=30))
        assert set(asked) == {(True,)}
        asked.clear()
        without = engine.generate(
            prompt, DecodingOptions(mode="linear_spec", block_length=8, max_tokens=30, adapter=False)
        )
        engine.generate(prompt, DecodingOptions(mode="diffusion", block_length=8, max_tokens=30))
        assert set(asked) == {(False,)}
    finally:
        engine.executor.run = run  # type: ignore[method-assign]
    assert with_adapter.token_ids == without.token_ids


def test_sampled_linear_spec_draws_the_tokens_that_sampled_ar_draws(
    both: tuple[Engine, NemotronLabsDiffusionModel],
) -> None:
    engine, _ = both
    prompt = list(range(200, 230))
    seen = set()
    for seed in range(6):
        drawn = [
            engine.generate(
                prompt, DecodingOptions(mode=mode, block_length=8, max_tokens=24, temperature=1.2, seed=seed)
            )
            for mode in ("ar", "linear_spec")
        ]
        assert drawn[0].token_ids == drawn[1].token_ids
        seen.add(tuple(drawn[0].token_ids))
    assert len(seen) == 6


def certain(tokens: list[int]) -> Candidates:
    """Candidates that put nearly all probability on one token a row; the runner-up is 600."""
    rows = len(tokens)
    return Candidates(
        logits=np.broadcast_to(np.array([10.0, 0.0], np.float32), (1, rows, 2)),
        tokens=np.array([[[token, 600] for token in tokens]]),
        log_sum_exp=np.full((1, rows), 10.0, np.float32),
    )


def run_script(sequence: Sequence, script: dict[str, list[list[int]]]) -> list[str]:
    """Feed each kind of pass the tokens scripted for it; returns the kinds in order."""
    kinds = []
    while sequence.finish_reason is None:
        needed = sequence.next_pass()
        kinds.append(needed.kind)
        sequence.absorb(needed, certain(script[needed.kind].pop(0)[: len(needed.rows)]))
    return kinds


def test_longest_matching_run_and_one_more() -> None:
    options = DecodingOptions(mode="linear_spec", block_length=4, max_tokens=6)
    sequence = Sequence([200, 201], options, MODEL, 256)
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
    assert sequence.finish_reason == "length"


def test_an_end_token_ends_the_text_at_once() -> None:
    for mode, commit in (("linear_spec", [301, END, 303, 304]), ("diffusion", [305])):
        sequence = Sequence([200], DecodingOptions(mode=mode, block_length=4, max_tokens=9), MODEL, 256)
        kinds = run_script(sequence, {"prefill": [[300]], "draft": [[301, END, 303]], "commit": [commit]})
        assert sequence.emitted == [300, 301, END]
        assert sequence.finish_reason == "stop"
        # Diffusion sees the end without a mask before it, and needs no commit.
        assert kinds == ["prefill", "draft", "commit"][: 3 if mode == "linear_spec" else 2]


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(["ar", "diffusion", "linear_spec"]),
    block_length=st.integers(1, 9),
    max_tokens=st.integers(1, 20),
    threshold=st.sampled_from([0.0, 0.5, 1.0]),
    prompt=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_rules_that_hold_whatever_the_engine_says(
    mode: Any, block_length: int, max_tokens: int, threshold: float, prompt: int, seed: int
) -> None:
    """Random candidates: the length limit is met, no mask comes out, rows committed never exceed tokens known."""
    rng = np.random.default_rng(seed)
    options = DecodingOptions(
        mode=mode, block_length=block_length, max_tokens=max_tokens, threshold=threshold, draft_threshold=threshold
    )
    sequence = Sequence([200] * prompt, options, MODEL, prefill_step=5)
    streamed: list[int] = []
    for _ in range(10_000):
        if sequence.finish_reason is not None:
            break
        needed = sequence.next_pass()
        reach = sequence.committed + len(needed.tokens)
        assert reach <= prompt + max_tokens
        rows = len(needed.rows)
        found = Candidates(
            logits=-np.sort(rng.exponential(size=(1, rows, 3)).astype(np.float32), axis=-1),
            tokens=rng.permuted(np.tile([END, *range(101, 125)], (1, rows, 1)), axis=-1)[..., :3],
            log_sum_exp=np.full((1, rows), 1.0, np.float32),
        )
        streamed += sequence.absorb(needed, found)
        assert sequence.committed <= prompt + len(sequence.emitted)
    assert sequence.emitted == streamed
    assert 1 <= len(streamed) <= max_tokens
    assert MASK not in streamed
    assert END not in streamed[:-1]
    assert sequence.finish_reason == ("stop" if streamed[-1] == END else "length")
    assert sequence.finish_reason == "stop" or len(streamed) == max_tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "quadratic"),
        ("block_length", 0),
        ("threshold", 1.5),
        ("draft_threshold", -0.1),
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("seed", -1),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(TriModeError, match=f"{field} is {value}"):
        DecodingOptions(**{field: value})


def test_prompts_that_cannot_be(both: tuple[Engine, NemotronLabsDiffusionModel]) -> None:
    engine, _ = both
    for prompt, max_tokens, message in (
        ([], 5, "the prompt is empty"),
        ([200] * 8190, 5, "exceeds the engine's capacity of 8192"),
        ([768], 5, "prompt token 768 is outside"),
    ):
        with pytest.raises(TriModeError, match=message):
            engine.generate(prompt, DecodingOptions(max_tokens=max_tokens))
    assert engine.executor.pool.active == 0
