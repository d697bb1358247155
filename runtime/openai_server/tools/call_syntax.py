"""How families of models write calls: opening mark, grammar, and reader; one class for each family."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from trimode.runtime.grammar.definition import JSON_STYLE
from trimode.runtime.openai_server.tools.call_reader import CallReader
from trimode.runtime.openai_server.tools.call_splitter import CallSplitter
from trimode.runtime.openai_server.tools.json_calls import JsonCallsReader
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


class CallSyntax(ABC):
    """open_mark, close_mark: of a block of calls. separator: text between two blocks."""

    open_mark: str
    close_mark: str

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        """special_tokens: ids by text. A mark that is one is that token in a grammar, not its letters."""
        self._special_tokens = special_tokens

    @property
    def has_special_marks(self) -> bool:
        """Whether the marks are missing in a text without special tokens."""
        return self.open_mark in self._special_tokens or self.close_mark in self._special_tokens

    @abstractmethod
    def reader(self, tools: Sequence[Tool]) -> CallReader:
        """Of what follows the opening mark."""

    def splitter(self, tools: Sequence[Tool]) -> CallSplitter:
        return CallSplitter(self.open_mark, lambda: self.reader(tools))

    def grammar(self, choice: ToolChoice, content_schema: Mapping[str, Any] | None = None) -> str:
        """The answers that ``choice`` allows, in llguidance's form of Lark.

        content_schema: of an answer that is no call; None for any text. Raises GrammarError for a tool that the syntax
        cannot express.
        """
        mark = self._literal(self.open_mark)
        if choice.required:
            start = [f"start: {mark} calls"]
        elif content_schema is not None:
            start = [f"start: {mark} calls | content", f"content: {_json(_with_options(content_schema))}"]
        elif self.open_mark in self._special_tokens:
            start = [f"start: TEXT | TEXT {mark} calls"]
        else:
            # The first mark in the text begins a call.
            start = ["start: TEXT | before calls", f"before[lazy]: TEXT {mark}"]
        rules = [*start, *self._calls(choice)]
        if any("TEXT" in rule for rule in rules):
            rules.append(r"TEXT: /(.|\n)*/")
        return "\n".join(["%llguidance {}", *rules])

    @abstractmethod
    def _calls(self, choice: ToolChoice) -> list[str]:
        """The rule ``calls`` of what follows the opening mark, and those that it needs."""

    def _literal(self, text: str) -> str:
        return f"<[{self._special_tokens[text]}]>" if text in self._special_tokens else _quoted(text)


class HermesSyntax(CallSyntax):
    """Hermes and Qwen: each call is a block with one JSON object."""

    open_mark, close_mark = "<tool_call>", "</tool_call>"

    def reader(self, tools: Sequence[Tool]) -> CallReader:  # noqa: ARG002 - values are JSON
        return JsonCallsReader(self.close_mark, in_array=False)

    def _calls(self, choice: ToolChoice) -> list[str]:
        return [
            *_repeated(choice, f'"\\n" {self._literal(self.open_mark)}'),
            *_json_calls(choice.tools, before="\n", after=f'"\\n" {self._literal(self.close_mark)}'),
        ]


class NemotronSyntax(CallSyntax):
    """Nemotron: all calls are one block with an array of JSON objects."""

    open_mark, close_mark = "<TOOLCALL>", "</TOOLCALL>"

    def reader(self, tools: Sequence[Tool]) -> CallReader:  # noqa: ARG002 - values are JSON
        return JsonCallsReader(self.close_mark, in_array=True)

    def _calls(self, choice: ToolChoice) -> list[str]:
        more = ' (", " call)*' if choice.parallel else ""
        return [
            f'calls: "[" call{more} "]" {self._literal(self.close_mark)}',
            *_json_calls(choice.tools, before="", after=""),
        ]


class XmlSyntax(CallSyntax):
    """Qwen3-Coder and Nemotron 3: each call is a block with a function and its parameters. Text is written as it is,
    other values as JSON.
    """

    open_mark, close_mark = "<tool_call>", "</tool_call>"

    def reader(self, tools: Sequence[Tool]) -> CallReader:
        parameters = {tool.name: tool.parameters for tool in tools}

        def value_of(function: str, parameter: str, written: str) -> Any:
            return _value(_property(parameters.get(function, {}), parameter), written)

        return XmlCallReader(self.close_mark, value_of)

    def _calls(self, choice: ToolChoice) -> list[str]:
        rules = _repeated(choice, f'"\\n" {self._literal(self.open_mark)}')
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(choice.tools))))
        close = f"{_quoted(f'{END_FUNCTION}{_LINE}')} {self._literal(self.close_mark)}"
        for number, tool in enumerate(choice.tools):
            required = tool.parameters.get("required", ())
            listed = []
            for place, name in enumerate(tool.parameters.get("properties", {})):
                if set(name) & set(">\n"):
                    raise GrammarError(f"{tool.name}: the name of a parameter contains '>' or a line break")
                rule = f"value_{number}_{place}"
                begin = _quoted(f"{PARAMETER}{name}>\n")
                listed.append(f"({begin} {rule})" + ("" if name in required else "?"))
                rules.append(_value_rule(rule, _property(tool.parameters, name), strict=tool.strict))
            begin = _quoted(f"\n{FUNCTION}{tool.name}>\n")
            rules.append(" ".join([f"call_{number}: {begin}", *listed, close]))
        return rules


SYNTAXES: Mapping[str, type[CallSyntax]] = {"hermes": HermesSyntax, "nemotron": NemotronSyntax, "xml": XmlSyntax}


def syntax_of_template(template: str | None) -> str:
    """The name of the syntax that a chat template shows the model; ``hermes`` if it shows none."""
    text = template or ""
    if NemotronSyntax.open_mark in text:
        return "nemotron"
    return "xml" if FUNCTION in text else "hermes"


def _repeated(choice: ToolChoice, between: str) -> list[str]:
    return [f"calls: call ({between} call)*" if choice.parallel else "calls: call"]


def _json_calls(tools: Sequence[Tool], before: str, after: str) -> list[str]:
    rules = ["call: " + " | ".join(f"call_{number}" for number in range(len(tools)))]
    for number, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
        rules.append(f"arguments_{number}: {_json(arguments_schema(tool))}")
        rules.append(f'call_{number}: {_quoted(before + head)} arguments_{number} "}}" {after}')
    return rules


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a call's arguments, with llguidance's options."""
    return _with_options({"type": "object", **tool.parameters}, strict=tool.strict)


def _with_options(schema: Mapping[str, Any], *, strict: bool = True) -> dict[str, Any]:
    return {"x-guidance": {**JSON_STYLE, **({} if strict else {"lenient": True})}, **schema}


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps(schema, ensure_ascii=False)


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
    end = _quoted(f"\n{END_PARAMETER}\n")
    texts = _listed(schema, "enum") or ([schema["const"]] if "const" in schema else [])
    if texts and all(isinstance(text, str) for text in texts):
        return f"{rule}: ({' | '.join(_quoted(text) for text in texts)}) {end}"
    if "string" in _types(schema):
        return f"{rule}[lazy]: TEXT {end}"
    return f"{rule}: {_json(_with_options(schema, strict=strict))} {end}"


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


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
