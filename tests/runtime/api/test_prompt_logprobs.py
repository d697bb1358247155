"""Log-probabilities of prompts are those of the PyTorch reference: long prompts, batches, reused prefixes, several
answers, and rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from trimode import LLM, GuidedDecodingParams, SamplingParams
from trimode.common.errors import TriModeError
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.runtime.decoding.sequence import PROMPT_LOGPROB_STEP
from trimode.runtime.request.outputs import PromptLogprobs


class Case(NamedTuple):
    llm: LLM
    reference: NemotronLabsDiffusionModel

    @torch.no_grad()
    def require_equal(self, prompt: list[int], found: PromptLogprobs | None, listed: int) -> None:
        assert found is not None
        assert found[0] is None
        assert len(found) == len(prompt)
        logits, _ = self.reference._causal_pass(torch.tensor(prompt), [])
        logits[:, self.llm.manifest.model.mask_token_id] = -torch.inf
        expected = torch.log_softmax(logits.float(), dim=-1).numpy()
        for place, row in enumerate(found[1:], start=1):
            assert row is not None
            of_reference = expected[place - 1]
            assert next(iter(row)) == prompt[place]
            assert listed <= len(row) <= listed + 1
            for token, logprob in row.items():
                assert logprob.logprob == pytest.approx(of_reference[token], abs=1e-4)
            best = sorted(
                (entry.logprob for entry in row.values() if entry.rank and entry.rank <= listed), reverse=True
            )
            np.testing.assert_allclose(best, np.sort(of_reference)[::-1][:listed], atol=1e-4)


@pytest.fixture(scope="module")
def case(tiny_engine: Path) -> Iterator[Case]:
    with LLM(tiny_engine, max_batch_size=4, measure_passes=False) as llm:
        yield Case(llm, load_reference(Checkpoint(tiny_engine.parent / "w4a16")))


def prompt_of(length: int, seed: int) -> list[int]:
    """Without special tokens."""
    return np.random.default_rng(seed).integers(101, 768, length).tolist()


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "diffusion", "auto"])
def test_prompts_of_all_lengths_in_one_batch(case: Case, mode: Any) -> None:
    """Beside requests that do not ask for them; each answer is the one without log-probabilities."""
    lengths = (1, 2, PROMPT_LOGPROB_STEP, PROMPT_LOGPROB_STEP + 1, PROMPT_LOGPROB_STEP + 2, 3 * PROMPT_LOGPROB_STEP)
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    plain = SamplingParams(max_tokens=6, mode=mode)
    params = [SamplingParams(max_tokens=6, mode=mode, prompt_logprobs=count % 4) for count in range(len(prompts))]
    found = case.llm.generate([*prompts, *prompts], [*params, *[plain] * len(prompts)], use_tqdm=False)
    for number, prompt in enumerate(prompts):
        with_them, without = found[number], found[number + len(prompts)]
        case.require_equal(prompt, with_them.prompt_logprobs, number % 4)
        assert without.prompt_logprobs is None
        assert with_them.outputs[0].token_ids == without.outputs[0].token_ids


def test_cached_rows_are_computed_again_and_kept_for_others(case: Case) -> None:
    prompt = prompt_of(200, 7)
    first = case.llm.generate(prompt, SamplingParams(max_tokens=2, prompt_logprobs=1))
    again = case.llm.generate(prompt, SamplingParams(max_tokens=2, prompt_logprobs=1))
    assert first.outputs[0].counts.cached_tokens == again.outputs[0].counts.cached_tokens == 0
    case.require_equal(prompt, again.prompt_logprobs, 1)
    reused = case.llm.generate(prompt, SamplingParams(max_tokens=2))
    assert reused.outputs[0].counts.cached_tokens == 199


def test_several_answers_and_rules(case: Case) -> None:
    """The prompt's rows have no mask. Only the first answer computes them."""
    prompt = prompt_of(150, 8)
    params = SamplingParams(
        max_tokens=20,
        n=2,
        temperature=1.0,
        seed=3,
        prompt_logprobs=2,
        logprobs=1,
        logit_bias={300: 4.0},
        guided_decoding=GuidedDecodingParams(regex="[a-z]{3,9}"),
        mode="linear_spec",
    )
    output = case.llm.generate(prompt, params)
    case.require_equal(prompt, output.prompt_logprobs, 2)
    assert output.outputs[1].counts.cached_tokens > 0
    assert all(answer.text.isalpha() for answer in output.outputs)


def test_a_stream_has_them_with_its_first_tokens(case: Case) -> None:
    prompt = prompt_of(300, 9)
    output = case.llm.generate_async(
        prompt, SamplingParams(max_tokens=12, prompt_logprobs=0, mode="ar"), streaming=True
    )
    for update in output:
        assert (update.prompt_logprobs is not None) == (update.outputs[0].length > 0)
    case.require_equal(prompt, output.prompt_logprobs, 0)


def test_more_than_the_engine_reports_is_refused(case: Case) -> None:
    for params, reason in (({"prompt_logprobs": 65}, "the engine reports 64"), ({"prompt_logprobs": -1}, "at least 0")):
        with pytest.raises(TriModeError, match=reason):
            case.llm.generate([300], SamplingParams(**params))
