"""SamplingParams: what makes no sense or cannot be honoured is refused by name, and TensorRT-LLM's are taken."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from trimode import GuidedDecodingParams, SamplingParams
from trimode.common.errors import TriModeError
from trimode.runtime.request.foreign_fields import REASONS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "quadratic"),
        ("block_length", 0),
        ("block_length", 1.5),
        ("max_tokens", 0),
        ("max_tokens", "9"),
        ("max_tokens", True),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("seed", -1),
        ("n", 0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop_token_ids", ["a"]),
        ("logprobs", -1),
        ("ignore_eos", 1),
        ("max_thinking_tokens", -1),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(TriModeError, match=f"^{field} is .*; it must be "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "ar", "block_length": 8}, "block_length has no meaning in mode ar"),
        ({"mode": "ar", "adapter": True}, "adapter has no meaning in mode ar"),
        ({"mode": "linear_spec", "threshold": 0.5}, "threshold has no meaning in mode linear_spec"),
        ({"mode": "auto", "draft_threshold": 0.5}, "draft_threshold has no meaning in mode auto"),
        ({"mode": "diffusion", "draft_threshold": 0.5}, "draft_threshold has no meaning in mode diffusion"),
        ({"mode": "auto", "tree_width": 8}, "tree_width has no meaning in mode auto"),
        ({"tree_width": 1}, "tree_width is 1; it must be at least 2"),
        ({"mode": "linear_spec", "tree_width": 8, "draft_threshold": 0.5}, "no meaning with draft_threshold"),
        ({"mode": "ar", "lookup": True}, "lookup has no meaning in mode ar"),
        ({"lookup": 1}, "lookup is 1; it must be true or false"),
        ({"mode": "diffusion", "threshold": 1.5}, "threshold is 1.5"),
        ({"mode": "linear_spec", "draft_threshold": -0.5}, "draft_threshold is -0.5"),
        (
            {"mode": "diffusion", "denoising": "quota", "threshold": 0.5},
            "threshold has no meaning with denoising quota",
        ),
        ({"mode": "diffusion", "denoising_steps": 4}, "denoising_steps has no meaning with denoising threshold"),
        ({"mode": "diffusion", "denoising": "top_n"}, "needs denoising_top_n"),
        ({"mode": "diffusion", "presence_penalty": 1.0}, "presence_penalty cannot be honoured in mode diffusion"),
        ({"n": 2}, "greedy answers are all equal"),
        ({"min_p": 0.1}, "greedy decoding does not sample"),
        ({"logprobs": 1, "max_thinking_tokens": 3}, "logprobs cannot be given with max_thinking_tokens"),
    ],
)
def test_combinations_that_cannot_be_honoured_are_refused_with_the_reason(options: Any, reason: str) -> None:
    with pytest.raises(TriModeError, match=reason):
        SamplingParams(**options)


@pytest.mark.parametrize("convert", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_numbers_and_ids_of_numpy_and_torch_are_pythons(convert: Any) -> None:
    given = SamplingParams(
        max_tokens=convert(3),
        temperature=convert(0.5),
        seed=convert(7),
        ignore_eos=convert(True),
        stop_token_ids=convert([5, 6]),
        allowed_token_ids=[convert(5), convert(6)],
        logit_bias={np.int64(5): convert(1.5)},
    )
    assert given == SamplingParams(
        max_tokens=3,
        temperature=0.5,
        seed=7,
        ignore_eos=True,
        stop_token_ids=[5, 6],
        allowed_token_ids=[5, 6],
        logit_bias={5: 1.5},
    )
    assert type(given.max_tokens) is int
    assert type(given.logit_bias and given.logit_bias[5]) is float
    for field, value in {"max_tokens": convert(3.0), "seed": convert(True), "stop_token_ids": convert([[5]])}.items():
        with pytest.raises(TriModeError, match=f"^{field} is .*; it must be "):
            SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("use_beam_search", "beam search is not supported"),
        ("end_id", "give stop_token_ids"),
        ("embedding_bias", "give logit_bias"),
        ("return_context_logits", "give logprobs"),
    ],
)
def test_tensorrt_llms_fields_that_we_have_not_are_refused_with_the_reason(field: str, reason: str) -> None:
    with pytest.raises(TriModeError, match=f"^SamplingParams has no {field}: .*{reason}"):
        SamplingParams(**{field: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        SamplingParams(nonsense=1)
    assert not {field.name for field in dataclasses.fields(SamplingParams)} & REASONS.keys()


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({}, True),
        ({"temperature": 0.0, "top_p": 0.9}, True),
        ({"top_k": 1}, True),
        ({"temperature": 0.7, "top_k": 1}, True),
        ({"temperature": 0.7}, False),
        ({"top_k": 5}, False),
        ({"top_p": 0.9}, False),
    ],
)
def test_what_is_greedy(options: Any, greedy: bool) -> None:
    assert SamplingParams(**options).greedy is greedy


@pytest.fixture
def theirs() -> type:
    """A record as tensorrt_llm defines it: some of its public fields, and what it fills in itself."""

    def fill_in(self: Any) -> None:
        self.pad_id = self.end_id
        self.best_of = self.best_of or self.n

    fields = {"end_id": None, "pad_id": None, "max_tokens": 32, "bad": None, "stop": None, "n": 1, "best_of": None}
    fields |= {"use_beam_search": False, "top_k": None, "top_p": None, "seed": None, "temperature": None}
    fields |= {"guided_decoding": None, "logits_processor": None}
    fields |= {"repetition_penalty": None, "ignore_eos": False, "detokenize": True, "_stop_word_ids": None}
    made = dataclasses.make_dataclass(
        "SamplingParams",
        [(name, Any, dataclasses.field(default=default)) for name, default in fields.items()],
        namespace={"__post_init__": fill_in},
        kw_only=True,
    )
    made.__module__ = "tensorrt_llm.sampling_params"
    return made


def test_tensorrt_llms_are_accepted_as_they_are(theirs: Any) -> None:
    ours = SamplingParams.of(theirs(max_tokens=7, temperature=0.5, top_p=0.9, n=2, stop=["x"], end_id=11))
    assert ours == SamplingParams(max_tokens=7, temperature=0.5, top_p=0.9, n=2, stop=["x"])
    assert SamplingParams.of(theirs(bad="word")) == SamplingParams(bad="word")


def test_tensorrt_llms_guided_decoding_is_accepted(theirs: Any) -> None:
    guided = dataclasses.make_dataclass(
        "GuidedDecodingParams", [(name, Any, None) for name in ("json", "regex", "grammar", "structural_tag")]
    )
    guided.__module__ = "tensorrt_llm.sampling_params"
    ours = SamplingParams.of(theirs(guided_decoding=guided(regex="a+")))
    assert ours.guided_decoding == GuidedDecodingParams(regex="a+")
    with pytest.raises(TriModeError, match="its calls differ"):
        SamplingParams.of(theirs(logits_processor=print))


@pytest.mark.parametrize("options", [{"detokenize": False}, {"use_beam_search": True}, {"best_of": 4, "n": 2}])
def test_fields_of_theirs_that_we_have_not_are_refused_when_set(theirs: Any, options: Any) -> None:
    field, value = next(iter(options.items()))
    with pytest.raises(TriModeError, match=f"^sampling_params: {field} is {value}: {REASONS[field]}"):
        SamplingParams.of(theirs(**options))


def test_another_type_is_refused() -> None:
    with pytest.raises(TriModeError, match="sampling_params is a dict"):
        SamplingParams.of({"max_tokens": 3})
    assert dataclasses.is_dataclass(SamplingParams.of(SamplingParams()))
