"""From the forms that a request may give to llguidance's definition of a grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from trimode.runtime.request.errors import GrammarError
from trimode.runtime.request.guided_decoding import GrammarKind, GrammarSource

# JSON is one line, written as Python's ``json.dumps`` does: text between two values is forced, so it needs no draft,
# and no model can write spaces until its length limit. A schema with ``x-guidance`` of its own replaces this.
JSON_STYLE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_STYLE = "x-guidance"
_TEXT = r"/(.|\n)*/"


def definition(source: GrammarSource, special_tokens: Mapping[str, int]) -> str:
    """llguidance's definition. special_tokens: ids by text; literals of structural tags may contain them.

    Raises GrammarError for what cannot be a grammar. Most errors are found when it is compiled.
    """
    if source.kind == "structural_tag":
        return _structural_tag(json.loads(source.text), special_tokens)
    return _DEFINITIONS[source.kind](source.text)


def _json(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(_with_style(json.loads(schema))))


def _with_style(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {_STYLE: JSON_STYLE, **schema}


def _json_object(_: str) -> str:
    return _json('{"type":"object"}')


def _lark_or_gbnf(text: str) -> str:
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # the converter raises what it meets
        raise GrammarError(f"the grammar cannot be read: {_first_line(error)}") from None


def _choice(text: str) -> str:
    """One terminal, so that thousands of choices are one automaton."""
    return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, json.loads(text))))


_DEFINITIONS: Mapping[GrammarKind, Callable[[str], str]] = {
    "json": _json,
    "json_object": _json_object,
    "regex": LLMatcher.grammar_from_regex,
    "grammar": _lark_or_gbnf,
    "choice": _choice,
}


def _structural_tag(tag: Any, special_tokens: Mapping[str, int]) -> str:
    """Free text with tags. A tag's trigger is its special token, or the first text that spells it."""
    if not isinstance(tag, Mapping) or tag.get("type", "structural_tag") != "structural_tag":
        raise GrammarError("structural_tag must be an object of type structural_tag")
    triggers, structures = tag.get("triggers", []), tag.get("structures", [])
    if not _is_list_of(triggers, str) or not _is_list_of(structures, Mapping):
        raise GrammarError("structural_tag needs triggers, a list of strings, and structures, a list of objects")
    rules = ["%llguidance {}", "start: (" + " | ".join(f"tag_{n}" for n in range(len(structures))) + ")* TEXT"]
    rules.append(f"TEXT: {_TEXT}")
    for number, structure in enumerate(structures):
        begin, end, schema = structure.get("begin"), structure.get("end"), structure.get("schema")
        if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, Mapping):
            raise GrammarError("structural_tag: each structure needs the strings begin and end, and the object schema")
        trigger = next((trigger for trigger in triggers if trigger and begin.startswith(trigger)), None)
        if trigger is None:
            raise GrammarError(f"structural_tag: {begin!r} begins with none of the triggers")
        content = "%json " + json.dumps(_with_style(schema))
        body = " ".join(part for part in (_literal(begin[len(trigger) :], special_tokens), content) if part)
        closing = _literal(end, special_tokens)
        if trigger in special_tokens:
            rules.append(f"tag_{number}: TEXT {_special(special_tokens[trigger])} {body} {closing}")
        else:
            rules.append(f"trigger_{number}[lazy]: TEXT {_quoted(trigger)}")
            rules.append(f"tag_{number}: trigger_{number} {body} {closing}")
    return LLMatcher.grammar_from_lark("\n".join(rules))


def _literal(text: str, special_tokens: Mapping[str, int]) -> str:
    """``text`` in Lark's notation. Special tokens in it are those tokens, not their letters."""
    if not text:
        return ""
    places = [(at, -len(token), token) for token in special_tokens if token and (at := text.find(token)) >= 0]
    if not places:
        return _quoted(text)
    at, _, token = min(places)
    rest = _literal(text[at + len(token) :], special_tokens)
    parts = (_quoted(text[:at]) if at else "", _special(special_tokens[token]), rest)
    return " ".join(part for part in parts if part)


def _special(token: int) -> str:
    return f"<[{token}]>"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, kind) for each in value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
