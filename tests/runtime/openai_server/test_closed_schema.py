"""Objects have the properties that their schema lists, and no others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trimode.runtime.openai_server.closed_schema import closed
from trimode.runtime.openai_server.output_formats import requested_format

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}
CLOSED = OBJECT | {"additionalProperties": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an object": (OBJECT, CLOSED),
    "an object in an object": (
        {"properties": {"b": OBJECT}},
        {"properties": {"b": CLOSED}, "additionalProperties": False},
    ),
    "objects in a list": ({"items": OBJECT}, {"items": CLOSED}),
    "one of two": ({"anyOf": [OBJECT, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
    "a definition": ({"$ref": "#/$defs/A", "$defs": {"A": OBJECT}}, {"$ref": "#/$defs/A", "$defs": {"A": CLOSED}}),
    "a property with the name of a keyword": (
        {"properties": {"items": {"type": "string"}, "properties": OBJECT}},
        {"properties": {"items": {"type": "string"}, "properties": CLOSED}, "additionalProperties": False},
    ),
}
OPEN: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "more by name": OBJECT | {"additionalProperties": {"type": "string"}},
    "more, said so": OBJECT | {"additionalProperties": True},
    "more by pattern": OBJECT | {"patternProperties": {"^x": {}}},
    "a required one that is not listed": OBJECT | {"required": ["a", "b"]},
    "more than are listed": OBJECT | {"minProperties": 2},
    "described in two places": OBJECT | {"anyOf": [{"required": ["a"]}]},
    "put together": {"allOf": [{"$ref": "#/$defs/A"}, {"required": ["b"]}], "$defs": {"A": OBJECT}},
    "an example": {"type": "object", "default": OBJECT, "enum": [OBJECT]},
}


@pytest.mark.parametrize("case", CASES)
def test_closed(case: str) -> None:
    given, expected = CASES[case]
    assert closed(given) == expected


def test_the_schema_of_a_response_format_is_closed() -> None:
    """As instructor sends it."""
    described = {"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT}}
    found = requested_format({"response_format": described})
    assert found is not None
    assert json.loads(found.guided.source.text) == CLOSED


@pytest.mark.parametrize("case", OPEN)
def test_left_open(case: str) -> None:
    assert closed(OPEN[case]) == OPEN[case]
