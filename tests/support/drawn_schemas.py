"""JSON schemas drawn at random from the kinds that people use: nesting, enums, patterns, arrays, optional keys, unions,
bounds and Unicode. Every one of them has values that are short.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
_KEYS = (
    "name",
    "age",
    "city",
    "id",
    "tags",
    "price",
    "größe",
    "naïve",
    "日付",
    "is_valid",
    "user id",
    "x",
    "items",
    "note",
)
_WORDS = ("red", "green", "blue", "Paris", "Łódź", "São Paulo", "東京", "yes", "no", 'quo"te', "back\\slash", "😀")
_PATTERNS = ("^[A-Z]{2}[0-9]{4}$", "^(foo|bar)-[a-z]{1,5}$", "^\\d{3}-\\d{4}$", "^[a-zé]{2,6}$", "^#[0-9a-f]{6}$")


def drawn_schema(seed: int) -> Schema:
    """An object, as most structured outputs are; sometimes an array or a union."""
    draw = random.Random(seed)  # noqa: S311
    kind = draw.random()
    if kind < 0.1:
        return _array(draw, 2)
    if kind < 0.2:
        return _union(draw, 2)
    if kind < 0.3:
        return _with_definitions(draw)
    return _object(draw, 2)


def _any(draw: random.Random, depth: int) -> Schema:
    nested: tuple[Callable[[random.Random, int], Schema], ...] = (_object, _array, _union) if depth else ()
    return draw.choice((_enum, _pattern, _integer, _number, _string, _boolean, _constant, _nullable, *nested))(
        draw, depth
    )


def _object(draw: random.Random, depth: int) -> Schema:
    keys = draw.sample(_KEYS, draw.randint(1, 4))
    required = [key for key in keys if draw.random() < 0.7]
    properties = {key: _any(draw, depth - 1) for key in keys}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(draw: random.Random, depth: int) -> Schema:
    least = draw.randint(0, 2)
    return {"type": "array", "items": _any(draw, depth - 1), "minItems": least, "maxItems": least + draw.randint(0, 2)}


def _union(draw: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(draw, depth - 1) for _ in range(draw.randint(2, 3))]}


def _with_definitions(draw: random.Random) -> Schema:
    item = {"type": "object", "properties": {"id": _integer(draw, 0), "note": {"$ref": "#/$defs/text"}}}
    item |= {"required": ["id", "note"], "additionalProperties": False}
    return {
        "$defs": {"item": item, "text": _string(draw, 0)},
        "type": "object",
        "properties": {"first": {"$ref": "#/$defs/item"}, "second": {"$ref": "#/$defs/item"}},
        "required": ["first"],
        "additionalProperties": False,
    }


def _enum(draw: random.Random, _: int) -> Schema:
    return {"enum": [*draw.sample(_WORDS, draw.randint(2, 4)), *draw.sample((1, -3.5, None, True), 1)]}


def _constant(draw: random.Random, _: int) -> Schema:
    return {"const": draw.choice((*_WORDS, 42, {"kind": "a", "n": [1, 2]}))}


def _pattern(draw: random.Random, _: int) -> Schema:
    return {"type": "string", "pattern": draw.choice(_PATTERNS)}


def _string(draw: random.Random, _: int) -> Schema:
    return {"type": "string", "maxLength": draw.randint(3, 10)}


def _integer(draw: random.Random, _: int) -> Schema:
    low = draw.randint(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 200)}


def _number(draw: random.Random, _: int) -> Schema:
    low = draw.randint(-5, 5)
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + draw.randint(1, 20)}


def _boolean(_: random.Random, __: int) -> Schema:
    return {"type": "boolean"}


def _nullable(draw: random.Random, _: int) -> Schema:
    return {"type": ["string", "null"], "maxLength": draw.randint(2, 6)}
