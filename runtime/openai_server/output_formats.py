"""The form that a response must have, under the names of OpenAI, vLLM, SGLang and llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from trimode.runtime.openai_server.closed_schema import closed
from trimode.runtime.request.errors import GrammarError
from trimode.runtime.request.guided_decoding import GrammarKind, GuidedDecodingParams

RESPONSE_FORMAT, STRUCTURED_OUTPUTS = "response_format", "structured_outputs"
# Fields whose value is the grammar itself.
_KINDS: dict[str, GrammarKind] = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
}
FIELDS = (RESPONSE_FORMAT, STRUCTURED_OUTPUTS, *_KINDS)


class OutputFormat(NamedTuple):
    """field: the one that requests it. parts: schemas that the format consists of, with their names in messages. If the
    format cannot be compiled, the first part that cannot be is the reason.
    """

    field: str
    guided: GuidedDecodingParams
    parts: Sequence[tuple[str, GuidedDecodingParams]] = ()


def requested_format(fields: Mapping[str, Any]) -> OutputFormat | None:
    """The format that these fields request; None for free text. Empty values request nothing.

    Raises FormatError that names the field.
    """
    given = [name for name in FIELDS if fields.get(name)]
    if len(given) > 1:
        raise FormatError(given[1], f"it cannot be combined with {given[0]}")
    if not given:
        return None
    name, value = given[0], fields[given[0]]
    try:
        if name == RESPONSE_FORMAT:
            guided = _of_response_format(value)
        elif name == STRUCTURED_OUTPUTS:
            guided = _of_structured_outputs(value)
        else:
            guided = GuidedDecodingParams(**{_KINDS[name]: value})
    except GrammarError as error:
        raise FormatError(name, str(error).removeprefix("guided_decoding: ")) from None
    return None if guided is None else OutputFormat(name, guided)


class FormatError(GrammarError):
    """``field``: the one that is wrong."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


def _of_response_format(value: Any) -> GuidedDecodingParams | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return GuidedDecodingParams(json_object=True)
    if kind == "json_schema":
        described = value.get("json_schema")
        if not isinstance(described, Mapping):
            raise GrammarError("json_schema must be an object with a schema")
        schema = described.get("schema")
        if schema is None:
            return GuidedDecodingParams(json_object=True)
        return GuidedDecodingParams(json=closed(schema) if isinstance(schema, Mapping) else schema)
    if kind == "structural_tag":
        return GuidedDecodingParams(structural_tag=value)
    raise GrammarError("type must be text, json_object, json_schema or structural_tag")


def _of_structured_outputs(value: Any) -> GuidedDecodingParams | None:
    if not isinstance(value, Mapping):
        raise GrammarError("it must be an object")
    given = {name: part for name, part in value.items() if part not in (None, False)}
    unknown = given.keys() - set(get_args(GrammarKind))
    if unknown:
        raise GrammarError(f"{min(unknown)} is not supported")
    return GuidedDecodingParams(**given) if given else None
