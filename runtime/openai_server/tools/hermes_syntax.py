"""Calls of Hermes and Qwen."""

from __future__ import annotations

from collections.abc import Sequence

from trimode.runtime.openai_server.tools.call_reader import CallReader
from trimode.runtime.openai_server.tools.call_syntax import CallSyntax, json_call_rules, repeated_call_rule
from trimode.runtime.openai_server.tools.json_calls import JsonCallsReader
from trimode.runtime.openai_server.tools.tool import Tool, ToolChoice


class HermesSyntax(CallSyntax):
    """Each call is a block with one JSON object."""

    open_mark, close_mark = "<tool_call>", "</tool_call>"

    def reader(self, tools: Sequence[Tool]) -> CallReader:  # noqa: ARG002 - values are JSON
        return JsonCallsReader(self.close_mark, in_array=False)

    def _calls(self, choice: ToolChoice) -> list[str]:
        return [
            *repeated_call_rule(choice, f'"\\n" {self.literal(self.open_mark)}'),
            *json_call_rules(choice.tools, before="\n", after=f'"\\n" {self.literal(self.close_mark)}'),
        ]
