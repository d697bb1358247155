"""The form of a response that may be tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trimode.runtime.openai_server.http_errors import BAD_REQUEST, ApiError
from trimode.runtime.openai_server.output_formats import OutputFormat
from trimode.runtime.openai_server.tools.call_syntax import CallSyntax, arguments_schema
from trimode.runtime.openai_server.tools.tool import ToolChoice
from trimode.runtime.request.errors import GrammarError
from trimode.runtime.request.guided_decoding import GuidedDecodingParams


def format_with_tools(syntax: CallSyntax, choice: ToolChoice, content: OutputFormat | None) -> OutputFormat:
    """content: the form of a response that is no call; None for free text. Not used if a call is required.

    Raises ApiError if that form is neither a JSON schema nor a JSON object, or a tool cannot be called.
    """
    schema = None if content is None or choice.required else _schema(content)
    try:
        grammar = syntax.grammar(choice, schema)
    except GrammarError as error:
        raise ApiError(BAD_REQUEST, f"tools: {error}", "tools") from None
    parts = [
        (f"the parameters of {tool.name}", GuidedDecodingParams(json=arguments_schema(tool))) for tool in choice.tools
    ]
    return OutputFormat("tools", GuidedDecodingParams(grammar=grammar), parts)


def _schema(content: OutputFormat) -> Mapping[str, Any]:
    source = content.guided.source
    if source.kind == "json_object":
        return {"type": "object"}
    if source.kind == "json":
        schema: Mapping[str, Any] = json.loads(source.text)
        return schema
    message = f"{content.field} cannot be combined with tools unless it is a JSON schema or a JSON object"
    raise ApiError(BAD_REQUEST, message, content.field)
