"""Calls of Nemotron."""

from __future__ import annotations

from collections.abc import Sequence

from trimode.runtime.openai_server.tools.call_reader import CallReader
from trimode.runtime.openai_server.tools.call_syntax import CallSyntax, json_call_rules
from trimode.runtime.openai_server.tools.json_calls import JsonCallsReader
from trimode.runtime.openai_server.tools.tool import Tool, ToolChoice


class NemotronSyntax(CallSyntax):
    """All calls are one block with an array of JSON objects."""

    open_mark, close_mark = "<TOOLCALL>", "</TOOLCALL>"
    template_mark = open_mark

    def reader(self, tools: Sequence[Tool]) -> CallReader:  # noqa: ARG002 - values are JSON
        return JsonCallsReader(self.close_mark, in_array=True)

    def _calls(self, choice: ToolChoice) -> list[str]:
        more = ' (", " call)*' if choice.parallel else ""
        return [
            f'calls: "[" call{more} "]" {self.literal(self.close_mark)}',
            *json_call_rules(choice.tools, before="", after=""),
        ]
