"""Bodies of OpenAI's newer API, ``/v1/responses``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from trimode.runtime.openai_server import neutral_fields
from trimode.runtime.openai_server.http_errors import BAD_REQUEST, ApiError, of_validation
from trimode.runtime.openai_server.neutral_fields import Neutral
from trimode.runtime.openai_server.output_formats import RESPONSE_FORMAT, FormatError, OutputFormat
from trimode.runtime.openai_server.request_bodies import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    Body,
    ChatCompletionRequest,
    Content,
    ConversationBody,
    DecodingBody,
    FunctionDefinition,
    Positive,
    Text,
    TextPart,
    at_most,
    content_text,
    unsupported,
)
from trimode.runtime.openai_server.response_bodies import NamedEvent, ResponseBody

ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")
TEXT_FORMAT = "text.format"
# What clients ask for without knowing the server; reasoning is returned as text, which they can send back.
INCLUDED = ("reasoning.encrypted_content",)


class ReasoningPart(TextPart):
    kinds: ClassVar[tuple[str, ...]] = ("reasoning_text", "summary_text", "text")


def _item_kind(item: Any) -> str:
    return "a reasoning item" if isinstance(item, dict) and item.get("type") == "reasoning" else "item"


class InputItem(Body):
    """A turn: a message, a function call, or a function's result."""

    no_effect = neutral_fields.NO_EFFECT_ITEM
    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Text | None = None
    output: Content | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> InputItem:
        needed = {
            "message": ("role",),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }
        if self.type not in needed:
            found = {"type": self.type[:40], "known": ", ".join(ITEM_TYPES)}
            raise PydanticCustomError("unsupported", "items of type {type} are not supported, only {known}", found)
        for field in needed[self.type]:
            if getattr(self, field) is None:
                raise unsupported(field, "Field required")
        return self


class ReasoningItem(Body):
    no_effect = neutral_fields.NO_EFFECT_ITEM
    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningPart], Field(fail_fast=True), at_most(MAX_PARTS, "parts")] | None = None
    content: Annotated[list[ReasoningPart], Field(fail_fast=True), at_most(MAX_PARTS, "parts")] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text or "" for part in self.content or self.summary or ())


Items = Annotated[
    list[
        Annotated[
            Annotated[InputItem, Tag("item")] | Annotated[ReasoningItem, Tag("a reasoning item")],
            Discriminator(_item_kind),
        ]
    ],
    Field(fail_fast=True, min_length=1),
    at_most(MAX_MESSAGES, "items"),
]
Input = Annotated[
    Annotated[Text, Tag("one text")] | Annotated[Items, Tag("items")],
    Discriminator(lambda value: "items" if isinstance(value, list) else "one text"),
]


def _function_tool(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") != "function":
        found = {"type": str(value.get("type"))[:40]}
        raise PydanticCustomError("unsupported", "tools of type {type} are not supported, only functions", found)
    return value


class FunctionTool(FunctionDefinition):
    type: Literal["function"]


class NamedFunction(Body):
    type: Literal["function"]
    name: str


ToolChoiceField = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a choice")] | Annotated[NamedFunction, Tag("a named tool")],
    Discriminator(lambda choice: "a named tool" if isinstance(choice, dict) else "a choice"),
]


class TextConfig(Body):
    neutral = neutral_fields.RESPONSES_TEXT
    format: dict[str, Any] | None = None


class ReasoningConfig(Body):
    neutral = neutral_fields.RESPONSES_REASONING
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesRequest(DecodingBody):
    """Stateless: the input is the whole conversation."""

    neutral: ClassVar[Mapping[str, Neutral]] = {**neutral_fields.DECODING, **neutral_fields.RESPONSES}
    prompt_field = "input"
    input: Input
    instructions: Text | None = None
    max_output_tokens: Positive | None = None
    tools: (
        Annotated[
            list[Annotated[FunctionTool, BeforeValidator(_function_tool)]],
            Field(fail_fast=True),
            at_most(MAX_TOOLS, "tools"),
        ]
        | None
    ) = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    metadata: dict[str, Any] | None = None
    include: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _can_be_honoured(self) -> ResponsesRequest:
        for name in self.include or ():
            if name not in INCLUDED:
                raise unsupported("include", f"{name[:40]} is not supported")
        return self

    def as_chat(self) -> ChatCompletionRequest:
        """The same request for /v1/chat/completions. Raises ApiError where fields contradict each other."""
        choice = self.tool_choice
        conversation = {
            "messages": self._messages(),
            "tools": [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in self.tools or ()
            ],
            "tool_choice": {"type": "function", "function": {"name": choice.name}}
            if isinstance(choice, NamedFunction)
            else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        try:
            checked = ConversationBody.model_validate(conversation)
        except ValidationError as error:
            raise _refusal(error) from None
        decoding = {name: getattr(self, name) for name in DecodingBody.model_fields}
        decoding |= {"max_tokens": self.max_output_tokens, "response_format": self._response_format()}
        chat = _Chat.model_construct(**{**checked.__dict__, **decoding})
        try:
            chat.output_format()
        except FormatError as error:
            raise _refused_format(error.field, str(error)) from None
        return chat

    def _response_format(self) -> dict[str, Any] | None:
        """``text.format`` in the older API's form."""
        given = self.text.format if self.text else None
        if given is None or given.get("type") != "json_schema":
            return given
        if not isinstance(given.get("schema"), dict):
            raise _refused_format(TEXT_FORMAT, "json_schema needs a schema, an object")
        return {"type": "json_schema", "json_schema": {name: part for name, part in given.items() if name != "type"}}

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        reasoning: dict[str, str] = {}
        for item in self.input:
            if isinstance(item, ReasoningItem):
                reasoning = {"reasoning_content": item.text}
                continue
            if item.type == "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content_text(item.output)})
            elif item.type == "function_call":
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                if not messages or messages[-1]["role"] != "assistant" or reasoning:
                    messages.append({"role": "assistant", "content": "", **reasoning})
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                thought = reasoning if item.role == "assistant" else {}
                messages.append({"role": item.role, "content": content_text(item.content), **thought})
            reasoning = {}
        return messages


class _Chat(ChatCompletionRequest):
    """The input and the format have other names in the newer API."""

    prompt_field = ResponsesRequest.prompt_field

    def output_format(self) -> OutputFormat | None:
        try:
            found = super().output_format()
        except FormatError as error:
            reason = str(error).replace(RESPONSE_FORMAT, TEXT_FORMAT)
            raise FormatError(TEXT_FORMAT if error.field == RESPONSE_FORMAT else error.field, reason) from None
        return found._replace(field=TEXT_FORMAT) if found and found.field == RESPONSE_FORMAT else found


def _refused_format(field: str, reason: str) -> ApiError:
    return ApiError(BAD_REQUEST, f"{field}: {reason}", field)


def _refusal(error: ValidationError) -> ApiError:
    return of_validation([{**found, "loc": ("body", *found["loc"])} for found in error.errors()])


class InputTokensDetails(ResponseBody):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(ResponseBody):
    reasoning_tokens: int


class ResponseUsage(ResponseBody):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


Status = Literal["in_progress", "completed", "incomplete"]


class OutputPart(ResponseBody):
    """``output_text`` of a message, with annotations and logprobs, or ``reasoning_text``."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class OutputItem(ResponseBody):
    """A message (role, content), a reasoning item (summary, content) or a function call (call_id, name, arguments)."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Status
    role: Literal["assistant"] | None = None
    summary: list[Any] | None = None
    content: list[OutputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class IncompleteDetails(ResponseBody):
    reason: Literal["max_output_tokens"]


class ResponseRecord(ResponseBody):
    """A whole response; in events of a stream, as far as it is known."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    background: Literal[False]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, Any]
    model: str
    output: Sequence[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class ResponseEvent(NamedEvent):
    """One event of a stream; which fields are set depends on its type."""

    sequence_number: int
    response: ResponseRecord | None = None
    output_index: int | None = None
    item: OutputItem | None = None
    item_id: str | None = None
    content_index: int | None = None
    part: OutputPart | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[Any] | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None


def echoed_tools(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Every field of a function, as the API returns them."""
    return [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": tool.strict,
        }
        for tool in body.tools or ()
    ]
