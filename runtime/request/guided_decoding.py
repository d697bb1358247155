"""``GuidedDecodingParams``: the form that an answer must have, with TensorRT-LLM's names and meanings."""

from __future__ import annotations

import json as json_codec
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from trimode.runtime.request.errors import GrammarError

GrammarKind = Literal["json", "json_object", "regex", "grammar", "choice", "structural_tag"]
_KINDS = ", ".join(get_args(GrammarKind))


class GrammarSource(NamedTuple):
    """What to compile: its kind, and the schema, expression, grammar, choices or tags as text. Equal sources compile to
    the same grammar.
    """

    kind: GrammarKind
    text: str


@dataclass(frozen=True, kw_only=True)
class GuidedDecodingParams:
    """The form of an answer. Exactly one of the fields is given.

    json: a JSON schema, as text, a dict, or a pydantic model. json_object: any JSON object. regex: a regular
    expression that the whole answer matches. grammar: a context-free grammar in Lark's notation with llguidance's
    extensions, or in GBNF (``root ::= ...``). choice: strings, one of which is the whole answer. structural_tag:
    free text in which each of some triggers begins a tag with content of a given schema, as text or a dict::

        {"type": "structural_tag", "triggers": ["<tool_call>"],
         "structures": [{"begin": "<tool_call>", "schema": {...}, "end": "</tool_call>"}]}

    Raises GrammarError that names the field and the rule. Whether the grammar compiles is checked with a request:
    see :meth:`trimode.runtime.api.llm.EngineLLM.compile_grammar`.
    """

    json: str | Mapping[str, Any] | Any = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    structural_tag: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise GrammarError(f"guided_decoding: json_object is {self.json_object!r}; it must be true or false")
        given = [name for name in get_args(GrammarKind) if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise GrammarError(f"guided_decoding needs exactly one of {_KINDS}; given: {found}")
        object.__setattr__(self, "_source", self._as_source(given[0]))

    @classmethod
    def of(cls, params: Any) -> GuidedDecodingParams:
        """``params`` itself, or the equivalent of TensorRT-LLM's."""
        if isinstance(params, cls):
            return params
        given = {name: getattr(params, name, None) for name in get_args(GrammarKind)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def source(self) -> GrammarSource:
        source: GrammarSource = self._source  # type: ignore[attr-defined]  # set by __post_init__
        return source

    def _as_source(self, name: str) -> GrammarSource:
        value = getattr(self, name)
        if name == "json_object":
            return GrammarSource("json_object", "")
        if name == "json":
            return GrammarSource("json", _json_text(name, _schema_of(value)))
        if name == "structural_tag":
            return GrammarSource("structural_tag", _json_text(name, value))
        if name == "choice":
            if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(s, str) for s in value):
                raise GrammarError("guided_decoding: choice must be a list of strings")
            if not value or not all(value):
                raise GrammarError("guided_decoding: choice must have at least one string, and no empty one")
            return GrammarSource("choice", json_codec.dumps(list(dict.fromkeys(value)), ensure_ascii=False))
        if not isinstance(value, str) or not value:
            raise GrammarError(f"guided_decoding: {name} must be a string that is not empty")
        return GrammarSource("regex" if name == "regex" else "grammar", value)


def _schema_of(value: Any) -> Any:
    """The schema of a pydantic model, which need not be installed, or the value itself."""
    schema = getattr(value, "model_json_schema", None)
    return schema() if callable(schema) else value


def _json_text(name: str, value: Any) -> str:
    """The value as JSON text without spaces, whether it was an object or text."""
    try:
        parsed = json_codec.loads(value) if isinstance(value, str) else value
        text = json_codec.dumps(parsed, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise GrammarError(f"guided_decoding: {name} is not JSON: {reason}") from None
    if not isinstance(parsed, Mapping):
        raise GrammarError(f"guided_decoding: {name} must be a JSON object")
    return text
