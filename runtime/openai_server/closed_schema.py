"""Closes the objects of a schema, because clients mostly have no use for properties that they do not declare, and a
model could write them without an end. What matches the closed schema matches the given one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where an object is described in several places, its properties are not all known in one of them.
_SEVERAL_PLACES = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "patternProperties"})
_OPEN = frozenset({"additionalProperties", "unevaluatedProperties", "minProperties", "dependentRequired"})
# Keywords whose value is a schema or a list of schemas, and those whose value is schemas by name.
_PARTS = frozenset({"items", "prefixItems", "anyOf", "oneOf"})
_NAMED_PARTS = frozenset({"properties", "$defs", "definitions"})


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema in which every object that lists its properties has no others, unless the schema says more about them.
    A schema with ``allOf`` stays as it is.
    """
    return dict(schema) if _has_all_of(schema) else _closed(schema)


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(schema)
    for keyword in _PARTS & found.keys():
        found[keyword] = _closed_part(found[keyword])
    for keyword in _NAMED_PARTS & found.keys():
        if isinstance(found[keyword], Mapping):
            found[keyword] = {name: _closed_part(part) for name, part in found[keyword].items()}
    properties, required = found.get("properties"), found.get("required", [])
    if not isinstance(properties, Mapping) or found.keys() & (_SEVERAL_PLACES | _OPEN):
        return found
    if isinstance(required, list) and all(isinstance(name, str) and name in properties for name in required):
        found["additionalProperties"] = False
    return found


def _closed_part(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _closed(value)
    return [_closed_part(part) for part in value] if isinstance(value, list) else value


def _has_all_of(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "allOf" in value or any(map(_has_all_of, value.values()))
    return isinstance(value, list) and any(map(_has_all_of, value))
