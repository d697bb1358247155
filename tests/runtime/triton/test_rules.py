"""TensorRT-LLM's tensors for guided decoding, banned words and least lengths become fields of SamplingParams."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.triton_backend_double import BackendRequest, backend_module
from trimode import GuidedDecodingParams, SamplingParams
from trimode.common.errors import TriModeError


@pytest.fixture
def params_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SamplingParams]]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend_module())
    from trimode.runtime.triton.triton_request import read

    yield lambda **fields: read(BackendRequest(text_input="abc", **fields), decoupled=False).params
    sys.modules.pop("trimode.runtime.triton.triton_request", None)


@pytest.mark.parametrize(
    ("kind", "guide", "expected"),
    [
        ("json", "", GuidedDecodingParams(json_object=True)),
        ("json_schema", '{"type": "integer"}', GuidedDecodingParams(json={"type": "integer"})),
        ("regex", "a|b", GuidedDecodingParams(regex="a|b")),
        ("ebnf_grammar", 'root ::= "a"', GuidedDecodingParams(grammar='root ::= "a"')),
        ("structural_tag", '{"triggers": []}', GuidedDecodingParams(structural_tag={"triggers": []})),
        ("", "", None),
    ],
)
def test_guides(
    params_of: Callable[..., SamplingParams], kind: str, guide: str, expected: GuidedDecodingParams | None
) -> None:
    found = params_of(guided_decoding_guide_type=kind, guided_decoding_guide=guide).guided_decoding
    assert (found and found.source) == (expected and expected.source)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"guided_decoding_guide_type": "xml"}, "guided_decoding_guide_type is 'xml'"),
        ({"guided_decoding_guide_type": "regex"}, "needs guided_decoding_guide"),
        ({"guided_decoding_guide": "a"}, "needs guided_decoding_guide_type"),
        ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"}, "is not JSON"),
        ({"min_tokens": -1}, "min_tokens is -1"),
    ],
)
def test_guides_that_are_refused(params_of: Callable[..., SamplingParams], fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(TriModeError, match=reason):
        params_of(**fields)


def test_banned_words_and_least_lengths(params_of: Callable[..., SamplingParams]) -> None:
    params = params_of(bad_words="nine", min_tokens=3)
    assert (params.bad_words, params.min_tokens) == (("nine",), 3)
    assert params_of(bad_words="").bad_words == ()
