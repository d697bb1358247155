"""From the fields of Dynamo's frontend to the parameters of a request."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.dynamo_double import request_of
from trimode import GuidedDecodingParams, SamplingParams
from trimode.common.errors import TriModeError
from trimode.runtime.dynamo.generate_request import sampling_params

END = 11


def params_of(name: str = "a request", **options: Any) -> SamplingParams:
    return sampling_params(request_of([1, 2, 3], **options), name, end_ids=frozenset({END}), top_k=64)


def test_every_field_of_the_frontend_has_its_place() -> None:
    found = params_of(
        max_tokens=20,
        min_tokens=2,
        stop=["end"],
        stop_token_ids=[3],
        stop_token_ids_hidden=None,
        max_thinking_tokens=5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.100000023841858,
        temperature=0.699999988079071,
        top_p=0.8999999761581421,
        top_k=5,
        min_p=0.10000000149011612,
        seed=9,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        annotations=[
            "trimode.mode=linear_spec",
            "trimode.block_length=8",
            "trimode.lookup=true",
            "other",
            'trimode.logit_bias={"7": -2.5}',
        ],
    )
    assert found == SamplingParams(
        max_tokens=20,
        min_tokens=2,
        stop=["end"],
        stop_token_ids=[3],
        max_thinking_tokens=5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.1,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=9,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        mode="linear_spec",
        block_length=8,
        lookup=True,
        logit_bias={7: -2.5},
    )


def test_the_models_end_tokens_are_no_stop_tokens() -> None:
    request = request_of([1])
    request["stop_conditions"]["stop_token_ids_hidden"] = [END, 40]
    assert sampling_params(request, "a", end_ids=frozenset({END}), top_k=64).stop_token_ids == [40]


def test_a_request_without_a_seed_has_the_one_of_its_id() -> None:
    assert params_of("one").seed == params_of("one").seed != params_of("two").seed


@pytest.mark.parametrize(("top_k", "expected"), [(-1, 0), (0, 0), (64, 64), (65, 0)])
def test_a_top_k_beyond_the_engines_draws_from_all_its_candidates(top_k: int, expected: int) -> None:
    assert params_of(top_k=top_k, temperature=1.0).top_k == expected


@pytest.mark.parametrize("kind", ["json", "json_object", "regex", "grammar", "choice", "structural_tag"])
def test_every_kind_of_guide_is_passed_on(kind: str) -> None:
    guides: dict[str, Any] = {
        "json": {"type": "object"},
        "json_object": True,
        "regex": "[0-9]+",
        "grammar": "start: /a/",
        "choice": ["a", "b"],
        "structural_tag": {"type": "structural_tag", "triggers": ["<"], "structures": []},
    }
    found = params_of(guided_decoding={kind: guides[kind], "backend": None})
    assert found.guided_decoding == GuidedDecodingParams(**{kind: guides[kind]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2}, "n is 2; Dynamo ends"),
        ({"best_of": 3}, "best_of is 3"),
        ({"use_beam_search": True}, "use_beam_search is True"),
        ({"routing": {"lora_name": "x"}}, "lora_name: this worker does not support LoRA"),
        ({"routing": {"cache_salt": "x"}}, "cache_salt: this worker does not support separate prefix caches"),
        ({"multi_modal_data": {"image": []}}, "multi_modal_data: .* images"),
        ({"annotations": ["trimode.mod=ar"]}, "write trimode.FIELD=VALUE, where FIELD is one of mode, "),
        ({"annotations": ["trimode.mode"]}, "write trimode.FIELD=VALUE"),
        ({"annotations": ["trimode.mode=ar", "trimode.mode=auto"]}, "mode is set twice"),
        ({"annotations": ["trimode.mode=fast"]}, "mode is 'fast'"),
        ({"max_thinking_tokens": 5, "annotations": ["trimode.max_thinking_tokens=5"]}, "set it once"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TriModeError, match=message):
        params_of(**options)
