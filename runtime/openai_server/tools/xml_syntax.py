"""Calls of Qwen3-Coder and Nemotron 3."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trimode.runtime.openai_server.tools.call_reader import CallReader
from trimode.runtime.openai_server.tools.call_syntax import (
    CallSyntax,
    json_rule,
    quoted,
    repeated_call_rule,
    with_options,
)
from trimode.runtime.openai_server.tools.tool import Tool, ToolChoice
from trimode.runtime.openai_server.tools.xml_calls import (
    END_FUNCTION,
    END_PARAMETER,
    FUNCTION,
    PARAMETER,
    XmlCallReader,
)
from trimode.runtime.request.errors import GrammarError

_LINE = "\n"
# Where a schema has the parts that it refers to.
_DEFINITIONS = ("$defs", "definitions")


class XmlSyntax(CallSyntax):
    """Each call is a block with a function and its parameters. Text is written as it is,
    other values as JSON.
    """

    open_mark, close_mark = "<tool_call>", "</tool_call>"
    template_mark = FUNCTION

    def reader(self, tools: Sequence[Tool]) -> CallReader:
        parameters = {tool.name: tool.parameters for tool in tools}

        def value_of(function: str, parameter: str, written: str) -> Any:
            return _value(_property(parameters.get(function, {}), parameter), written)

        return XmlCallReader(self.close_mark, value_of)

    def _calls(self, choice: ToolChoice) -> list[str]:
        rules = repeated_call_rule(choice, f'"\\n" {self.literal(self.open_mark)}')
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(choice.tools))))
        close = f"{quoted(f'{END_FUNCTION}{_LINE}')} {self.literal(self.close_mark)}"
        for number, tool in enumerate(choice.tools):
            required = tool.parameters.get("required", ())
            listed = []
            for place, name in enumerate(tool.parameters.get("properties", {})):
                if set(name) & set(">\n"):
                    raise GrammarError(f"{tool.name}: the name of a parameter contains '>' or a line break")
                rule = f"value_{number}_{place}"
                begin = quoted(f"{PARAMETER}{name}>\n")
                listed.append(f"({begin} {rule})" + ("" if name in required else "?"))
                rules.append(_value_rule(rule, _property(tool.parameters, name), strict=tool.strict))
            begin = quoted(f"\n{FUNCTION}{tool.name}>\n")
            rules.append(" ".join([f"call_{number}: {begin}", *listed, close]))
        return rules


def _property(parameters: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The schema of a property, with the definitions that it may refer to."""
    found = parameters.get("properties", {}).get(name, {})
    definitions = {key: parameters[key] for key in _DEFINITIONS if isinstance(parameters.get(key), Mapping)}
    if not isinstance(found, Mapping):
        return {}
    for key, named in definitions.items():
        reference = str(found.get("$ref", ""))
        if reference.startswith(f"#/{key}/") and isinstance(target := named.get(reference[len(key) + 3 :]), Mapping):
            found = target
    return {**definitions, **found}


def _value_rule(rule: str, schema: Mapping[str, Any], *, strict: bool) -> str:
    end = quoted(f"\n{END_PARAMETER}\n")
    texts = _listed(schema, "enum") or ([schema["const"]] if "const" in schema else [])
    if texts and all(isinstance(text, str) for text in texts):
        return f"{rule}: ({' | '.join(quoted(text) for text in texts)}) {end}"
    if "string" in _types(schema):
        return f"{rule}[lazy]: TEXT {end}"
    return f"{rule}: {json_rule(with_options(schema, strict=strict))} {end}"


def _types(schema: Any) -> set[str]:
    """JSON types that the schema allows; empty if it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    found = [schema["type"]] if isinstance(schema.get("type"), str) else _listed(schema, "type")
    types = {kind for kind in found if isinstance(kind, str)}
    for branches in ("anyOf", "oneOf"):
        types |= {kind for branch in _listed(schema, branches) for kind in _types(branch)}
    for value in _listed(schema, "enum"):
        types.add("string" if isinstance(value, str) else "other")
    return types


def _listed(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    """A keyword's list. What is no list is refused when the grammar is compiled."""
    found = schema.get(keyword)
    return found if isinstance(found, list) else []


def _value(schema: Mapping[str, Any], written: str) -> Any:
    """The value of a parameter: text where the schema allows text only, and wherever it is not JSON."""
    types = _types(schema)
    if types == {"string"}:
        return written
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        return written
    return written if isinstance(value, str) and "string" in types else value
