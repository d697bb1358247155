"""Grammars as requests give them: which fields there are, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from trimode.runtime.request.errors import GrammarError
from trimode.runtime.request.guided_decoding import GuidedDecodingParams


class Person(BaseModel):
    name: str


def test_a_schema_may_be_text_a_dict_or_a_pydantic_model() -> None:
    schema = Person.model_json_schema()
    sources = {GuidedDecodingParams(json=given).source for given in (Person, schema)}
    assert len(sources) == 1
    assert (
        GuidedDecodingParams(json='{"type" : "object"}').source == GuidedDecodingParams(json={"type": "object"}).source
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "given: regex, choice"),
        ({"json": "{"}, "json is not JSON"),
        ({"json": [1]}, "must be a JSON object"),
        ({"json": {"enum": [float("nan")]}}, "json is not JSON"),
        ({"json_object": 1}, "true or false"),
        ({"regex": ""}, "not empty"),
        ({"grammar": 3}, "must be a string"),
        ({"choice": "yes"}, "list of strings"),
        ({"choice": []}, "at least one string"),
        ({"choice": ["a", ""]}, "no empty one"),
        ({"structural_tag": "x"}, "structural_tag is not JSON"),
    ],
)
def test_what_is_no_grammar_is_refused(fields: dict, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        GuidedDecodingParams(**fields)


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(GrammarError, match="nested too deeply"):
        GuidedDecodingParams(json=schema)
