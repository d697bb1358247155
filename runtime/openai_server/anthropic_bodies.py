"""Bodies of Anthropic's API, ``/v1/messages``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from trimode.runtime.openai_server import neutral_fields
from trimode.runtime.openai_server.http_errors import BAD_REQUEST, ApiError, of_validation
from trimode.runtime.openai_server.neutral_fields import Neutral
from trimode.runtime.openai_server.output_formats import FormatError, OutputFormat
from trimode.runtime.openai_server.request_bodies import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    Body,
    ChatCompletionRequest,
    Content,
    ConversationBody,
    DecodingBody,
    Positive,
    StopStrings,
    Text,
    at_most,
    content_text,
    unsupported,
)
from trimode.runtime.openai_server.response_bodies import MessagesError, NamedEvent, ResponseBody

FORMAT = "output_config.format"
# Fields that each kind of block needs.
_BLOCKS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}


class Block(Body):
    """Part of a turn."""

    no_effect = neutral_fields.NO_EFFECT_BLOCK
    type: str
    text: Text | None = None
    thinking: Text | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Content | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Block:
        if self.type not in _BLOCKS:
            found = {"type": self.type[:40], "known": ", ".join(_BLOCKS)}
            raise PydanticCustomError("unsupported", "blocks of type {type} are not supported, only {known}", found)
        for field in _BLOCKS[self.type]:
            if getattr(self, field) is None:
                raise unsupported(field, "Field required")
        return self


Blocks = Annotated[list[Block], Field(fail_fast=True), at_most(MAX_PARTS, "content blocks")]


class Turn(Body):
    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("one text")] | Annotated[Blocks, Tag("parts")],
        Discriminator(lambda content: "parts" if isinstance(content, list) else "one text"),
    ]

    def as_chat(self) -> list[dict[str, Any]]:
        """The turn as messages of a chat. Results of tools are messages of their own, before the user's text."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        of_kind = {kind: [block for block in self.content if block.type == kind] for kind in _BLOCKS}
        results = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": content_text(block.content)}
            for block in of_kind["tool_result"]
        ]
        text = "".join(block.text or "" for block in of_kind["text"])
        if self.role == "user":
            return [*results, {"role": "user", "content": text}] if text or not results else results
        calls = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
            for block in of_kind["tool_use"]
        ]
        thought = "".join(block.thinking or "" for block in of_kind["thinking"])
        return [
            *results,
            {"role": "assistant", "content": text, "reasoning_content": thought or None, "tool_calls": calls or None},
        ]


class CustomTool(Body):
    no_effect = frozenset({"cache_control"})
    type: Literal["custom"] | None = None
    name: str
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class MessagesToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> MessagesToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise unsupported("name", "a choice of type tool needs it, and no other type has it")
        return self


class Thinking(Body):
    no_effect = frozenset({"display"})
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Positive | None = None


class OutputConfig(Body):
    format: dict[str, Any] | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class MessagesBody(DecodingBody):
    """The fields of both endpoints."""

    neutral: ClassVar[Mapping[str, Neutral]] = {**neutral_fields.DECODING, **neutral_fields.MESSAGES}
    prompt_field = "messages"
    messages: Annotated[list[Turn], Field(fail_fast=True, min_length=1), at_most(MAX_MESSAGES, "messages")]
    system: Content | None = None
    stop_sequences: StopStrings | None = None
    tools: Annotated[list[CustomTool], Field(fail_fast=True), at_most(MAX_TOOLS, "tools")] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def as_chat(self) -> ChatCompletionRequest:
        """The same request for /v1/chat/completions. Raises ApiError where fields contradict each other."""
        choice, config = self.tool_choice, self.output_config or OutputConfig()
        conversation = {
            "messages": self._chat_messages(),
            "continue_final_message": self.messages[-1].role == "assistant",
            "tools": [_function(tool) for tool in self.tools or ()],
            "tool_choice": None if choice is None else _CHOICES.get(choice.type, _named(choice.name)),
            "parallel_tool_calls": None if choice is None else not choice.disable_parallel_tool_use,
            "reasoning_effort": config.effort,
            "chat_template_kwargs": self._template_variables(),
        }
        try:
            checked = ConversationBody.model_validate(conversation)
        except ValidationError as error:
            raise of_validation([{**found, "loc": ("body", *found["loc"])} for found in error.errors()]) from None
        decoding = {name: getattr(self, name) for name in DecodingBody.model_fields}
        decoding |= {"stop": self.stop_sequences, "response_format": _response_format(config.format)}
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            decoding["max_thinking_tokens"] = self.thinking.budget_tokens
        chat = _Chat.model_construct(**{**checked.__dict__, **decoding})
        try:
            chat.output_format()
        except FormatError as error:
            raise ApiError(BAD_REQUEST, f"{error.field}: {error}", error.field) from None
        return chat

    def _chat_messages(self) -> list[dict[str, Any]]:
        system = content_text(self.system)
        return [
            *([{"role": "system", "content": system}] if system else []),
            *(message for turn in self.messages for message in turn.as_chat()),
        ]

    def _template_variables(self) -> dict[str, Any] | None:
        if self.thinking is None or self.thinking.type == "adaptive":
            return self.chat_template_kwargs
        return {"enable_thinking": self.thinking.type == "enabled", **(self.chat_template_kwargs or {})}


class MessagesRequest(MessagesBody):
    max_tokens: Positive


class CountTokensRequest(MessagesBody):
    pass


class _Chat(ChatCompletionRequest):
    """The format has another name in this API."""

    def output_format(self) -> OutputFormat | None:
        try:
            found = super().output_format()
        except FormatError as error:
            raise FormatError(FORMAT if error.field == "response_format" else error.field, str(error)) from None
        return found._replace(field=FORMAT) if found and found.field == "response_format" else found


_CHOICES: Mapping[str, Any] = {"auto": "auto", "any": "required", "none": "none"}


def _named(name: str | None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _function(tool: CustomTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function | {"strict": tool.strict}}


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if given is None:
        return None
    if given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
        raise ApiError(BAD_REQUEST, f"{FORMAT}: type should be 'json_schema', with a schema", FORMAT)
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given["schema"]}}


class MessagesUsage(ResponseBody):
    """input_tokens: without those of the cache."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageRecord(ResponseBody):
    """content: blocks of types thinking, text and tool_use, in this order."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessageEvent(NamedEvent):
    """One event of a stream; which fields are set depends on its type."""

    message: MessageRecord | None = None
    index: int | None = None
    content_block: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    usage: MessagesUsage | None = None
    error: MessagesError | None = None


class TokenCount(ResponseBody):
    input_tokens: int
