"""Objects of a function's schema have the properties that it lists, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from trimode.runtime.openai_server.tools.closed_schema import closed

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
    "described in two places": OBJECT | {"anyOf": [{"required": ["a"]}]},
    "put together": {"allOf": [{"$ref": "#/$defs/A"}, {"required": ["b"]}], "$defs": {"A": OBJECT}},
    "an example": {"type": "object", "default": OBJECT, "enum": [OBJECT]},
}


@pytest.mark.parametrize("case", CASES)
def test_closed(case: str) -> None:
    given, expected = CASES[case]
    assert closed(given) == expected


@pytest.mark.parametrize("case", OPEN)
def test_left_open(case: str) -> None:
    assert closed(OPEN[case]) == OPEN[case]
