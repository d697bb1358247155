"""How a family of models writes calls: marks, grammar and reader; and the parts of grammars that families share."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from trimode.runtime.grammar.definition import JSON_STYLE
from trimode.runtime.openai_server.tools.call_reader import CallReader
from trimode.runtime.openai_server.tools.call_splitter import CallSplitter
from trimode.runtime.openai_server.tools.tool import Tool, ToolChoice


class CallSyntax(ABC):
    """open_mark, close_mark: of a block of calls. template_mark: text in the chat templates of the family's models, and
    in no other; None if there is none.
    """

    open_mark: ClassVar[str]
    close_mark: ClassVar[str]
    template_mark: ClassVar[str | None] = None

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
        mark = self.literal(self.open_mark)
        if choice.required:
            start = [f"start: {mark} calls"]
        elif content_schema is not None:
            start = [f"start: {mark} calls | content", f"content: {json_rule(with_options(content_schema))}"]
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

    def literal(self, text: str) -> str:
        return f"<[{self._special_tokens[text]}]>" if text in self._special_tokens else quoted(text)


def repeated_call_rule(choice: ToolChoice, between: str) -> list[str]:
    """The rule ``calls`` of one call, or of many with ``between`` in between."""
    return [f"calls: call ({between} call)*" if choice.parallel else "calls: call"]


def json_call_rules(tools: Sequence[Tool], before: str, after: str) -> list[str]:
    """The rules of calls that are JSON objects, with these texts around each."""
    rules = ["call: " + " | ".join(f"call_{number}" for number in range(len(tools)))]
    for number, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
        rules.append(f"arguments_{number}: {json_rule(arguments_schema(tool))}")
        rules.append(f'call_{number}: {quoted(before + head)} arguments_{number} "}}" {after}')
    return rules


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a call's arguments, with llguidance's options."""
    return with_options({"type": "object", **tool.parameters}, strict=tool.strict)


def with_options(schema: Mapping[str, Any], *, strict: bool = True) -> dict[str, Any]:
    """A JSON schema with llguidance's options."""
    return {"x-guidance": {**JSON_STYLE, **({} if strict else {"lenient": True})}, **schema}


def json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps(schema, ensure_ascii=False)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
