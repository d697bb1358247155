"""Request bodies of the OpenAI API, with TriMode's additional fields.

- ``null`` is the default, for every field.
- A field of a feature that this server lacks accepts its neutral values, those that request nothing. Other values are
  refused, with the field's name.
- Unknown fields are ignored; :func:`take_ignored_fields` lists them.

Fields of :class:`SamplingParams` have its names and rules. This module also checks what a server must bound.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from trimode.runtime.openai_server import neutral_fields, output_formats
from trimode.runtime.openai_server.closed_schema import closed
from trimode.runtime.openai_server.neutral_fields import Neutral
from trimode.runtime.openai_server.output_formats import FormatError, OutputFormat, requested_format
from trimode.runtime.openai_server.tools.tool import Tool, ToolChoice
from trimode.runtime.request.openai_defaults import set_temperature
from trimode.runtime.request.sampling_params import MOST_BIASES, Denoising, Mode, SamplingParams

SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
MAX_CHOICES = 128
MAX_MESSAGES = 2048
MAX_PARTS = 64
MAX_TOOLS = 128
MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 1 << 20
MAX_STOPS = 16
MAX_STOP_TOKENS = 64
MAX_ALLOWED_TOKENS = 1024
MAX_STOP_CHARACTERS = 1000
MAX_LOGPROBS = 20
MAX_TOKEN_DIGITS = 10
# Fields of one JSON object.
MAX_FIELDS = 100
TOO_MANY_FIELDS = "too_many_fields"
UNSUPPORTED_FIELD = "unsupported_field"
# Unknown fields that are reported, and characters of each.
MAX_REPORTED_FIELDS = 16
MAX_FIELD_NAME = 64
# OpenAI's own default for /v1/completions.
COMPLETION_TOKENS = 16
NO_LIMIT = -1


# Validators raise PydanticCustomError. A ValueError would be kept by pydantic, with its frames and so with the body.
def _valid_unicode(text: str) -> str:
    """JSON can spell lone surrogates, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "Input should be valid Unicode, without lone surrogates") from None
    return text


def _whole_number(value: Any) -> Any:
    """100.0 is an integer in JSON; some clients write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def at_most(limit: int, things: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > limit:
            found = {"count": len(value), "limit": limit, "things": things}
            raise PydanticCustomError("too_many", "{count} {things} were sent; the limit is {limit}", found)
        return value

    return BeforeValidator(check)


def _token_biases(value: Any) -> Any:
    """JSON's keys are text. A bias of zero changes nothing."""
    if not isinstance(value, dict):
        return value
    biases: dict[int, Any] = {}
    for key, bias in value.items():
        if not isinstance(key, str) or not key.isdecimal() or len(key) > MAX_TOKEN_DIGITS:
            raise PydanticCustomError("token", "Keys should be token ids")
        if bias != 0:
            biases[int(key)] = bias
    if len(biases) > MOST_BIASES:
        bounds = {"count": len(biases), "limit": MOST_BIASES}
        raise PydanticCustomError("too_many", "{count} biases were sent; the limit is {limit}", bounds)
    return biases


def _stop_list(value: Any) -> Any:
    """One string or a list; empty strings and null stop nothing."""
    listed = [value] if isinstance(value, str) else value
    return [stop for stop in listed if stop not in ("", None)] if isinstance(listed, list) else listed


def _no_logprobs(value: Any) -> Any:
    """The chat endpoint's ``false``, sent to the completions endpoint."""
    return None if value is False else value


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Text = Annotated[str, AfterValidator(_valid_unicode)]
Integer = Annotated[int, BeforeValidator(_whole_number)]
TokenId = Annotated[Integer, Field(ge=0, lt=2**31)]
Positive = Annotated[Integer, Field(ge=1, lt=2**31)]
Natural = Annotated[Integer, Field(ge=0, lt=2**31)]
# -1: all that fits.
Length = Annotated[Integer, Field(ge=-1, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[Text, Field(max_length=MAX_STOP_CHARACTERS)]
# fail_fast: a list ends at its first wrong element. A finding costs far more memory than the element it is about.
StopStrings = Annotated[
    list[StopString],
    Field(fail_fast=True),
    at_most(MAX_STOPS, "stop strings"),
    BeforeValidator(_stop_list, json_schema_input_type=str | list[str | None]),
]
StopTokenIds = Annotated[list[TokenId], Field(fail_fast=True), at_most(MAX_STOP_TOKENS, "stop tokens")]
AllowedTokenIds = Annotated[list[TokenId], Field(fail_fast=True), at_most(MAX_ALLOWED_TOKENS, "allowed tokens")]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1), at_most(MAX_PROMPTS, "prompts")]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1), at_most(MAX_PROMPT_TOKENS, "prompt tokens")]
TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1), at_most(MAX_PROMPTS, "prompts")]
LogprobCount = Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)]


def _prompt_kind(prompt: Any) -> str | None:
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if isinstance(first, list):
        return "token id lists"
    if isinstance(first, int | float):
        return "token ids"
    return "texts" if isinstance(prompt, list) else "one text"


# Names of union branches, which pydantic puts into the paths of its findings.
BRANCHES = frozenset(
    {
        *("str", "one text", "texts", "parts", "token ids", "token id lists", "chat body", "completion body"),
        *("a choice", "a named tool", "items", "item", "a reasoning item"),
    }
)
Prompt = Annotated[
    Annotated[Text, Tag("one text")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[TokenIds, Tag("token ids")]
    | Annotated[TokenIdLists, Tag("token id lists")],
    Discriminator(_prompt_kind),
]


# Fields whose empty object PHP's clients write as an empty list.
OBJECT_FIELDS = ("chat_template_kwargs", "logit_bias", "response_format", "stream_options", "structured_outputs")


class Body(BaseModel):
    """Unknown fields are kept in ``model_extra`` until :func:`take_ignored_fields` removes them.

    neutral: fields of missing features. no_effect: fields that are accepted with any value and not used.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)
    neutral: ClassVar[Mapping[str, Neutral]] = {}
    no_effect: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, given: Any) -> Any:
        """One finding about all fields, not one about each."""
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_FIELDS:
            bounds = {"most": MAX_FIELDS, "count": len(given)}
            raise PydanticCustomError(TOO_MANY_FIELDS, "Input should have at most {most} fields, not {count}", bounds)
        for name in given.keys() & cls.neutral.keys():
            if not cls.neutral[name].accepts(given[name]):
                raise unsupported(name, cls.neutral[name].reason)
        empty: dict[str, Any] = {name: {} for name in OBJECT_FIELDS if given.get(name) == []}
        return given | empty if empty else given


def unsupported(field: str, reason: str) -> PydanticCustomError:
    """A finding about ``field``, raised where the whole object is in view."""
    return PydanticCustomError(UNSUPPORTED_FIELD, "{reason}", {"field": field, "reason": reason})


def take_ignored_fields(body: Body) -> list[str]:
    """Remove the unknown fields of ``body`` and return their paths: ``name``, or ``messages[].name`` within a list.

    At most MAX_REPORTED_FIELDS paths, in printable ASCII. A field that is null requests nothing and is not listed.
    """
    names = dict.fromkeys(_unknown_fields(body, ""))
    return [_printable(name) for name in names][:MAX_REPORTED_FIELDS]


def _unknown_fields(body: Body, prefix: str) -> Iterator[str]:
    extra = body.model_extra or {}
    known = body.neutral.keys() | body.no_effect
    yield from (prefix + name for name, value in extra.items() if value is not None and name not in known)
    extra.clear()
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, Body):
            yield from _unknown_fields(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Body):
            for element in value:
                yield from _unknown_fields(element, f"{prefix}{name}[].")


def _printable(name: str) -> str:
    """Safe in a log line and in an HTTP header."""
    short = name if len(name) <= MAX_FIELD_NAME else name[:MAX_FIELD_NAME] + "..."
    return json.dumps(short)[1:-1].replace(",", "\\u002c")


class StreamOptions(Body):
    """``continuous_usage_stats``: with ``include_usage``, every chunk has the usage so far."""

    neutral = neutral_fields.STREAM_OPTIONS
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class PromptBody(Body):
    """``prompt_field``: the field that holds the prompt, for error messages."""

    prompt_field: ClassVar[str]
    model: str | None = None


class DecodingBody(PromptBody):
    """The fields of both completion endpoints."""

    neutral = neutral_fields.DECODING
    no_effect = neutral_fields.NO_EFFECT_DECODING
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Length | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Share | None = None
    seed: Annotated[Integer, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopStrings | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # The names of vLLM and SGLang.
    top_k: Annotated[Integer, Field(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    min_tokens: Natural | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    # TriMode's own.
    mode: Mode | None = None
    block_length: Positive | None = None
    adapter: bool | None = None
    draft_threshold: Share | None = None
    lookup: bool | None = None
    tree_width: Annotated[Integer, Field(ge=2, lt=2**31)] | None = None
    denoising: Denoising | None = None
    threshold: Share | None = None
    denoising_steps: Positive | None = None
    denoising_top_n: Positive | None = None
    max_thinking_tokens: Natural | None = None
    return_token_origins: bool | None = None
    logit_bias: Annotated[dict[int, Bias] | None, BeforeValidator(_token_biases, dict[str, float])] = None
    allowed_token_ids: AllowedTokenIds | None = None
    bad_words: StopStrings | None = None
    # The form of the response: output_formats.py.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_valid_format(self) -> DecodingBody:
        try:
            self.output_format()
        except FormatError as error:
            raise unsupported(error.field, str(error)) from None
        return self

    def output_format(self) -> OutputFormat | None:
        """The form that the response must have; None for free text."""
        return requested_format({name: getattr(self, name) for name in output_formats.FIELDS})

    def sampling_params(self, **resolved: Any) -> SamplingParams:
        """``resolved``: fields that the server decides, None for their defaults.

        Raises TriModeError that names the field, where values contradict each other.
        """
        given = self.model_dump(include=set(SAMPLING_FIELDS) - resolved.keys(), exclude_none=True)
        given |= {name: value for name, value in resolved.items() if value is not None}
        given["record_drafts"] = bool(self.return_token_origins)
        if self.bad_words:
            given["bad"] = self.bad_words
        if not given.get("allowed_token_ids"):
            given.pop("allowed_token_ids", None)
        if given.get("seed") == -1:
            del given["seed"]
        elif "seed" in given:
            given["seed"] %= 2**64
        if not given.get("stop"):
            given.pop("stop", None)
        set_temperature(given)
        return SamplingParams(**given)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class TextPart(Body):
    """Part of a message's content; ``input_text`` and ``output_text`` are the names of OpenAI's newer API."""

    no_effect = neutral_fields.NO_EFFECT_PART
    kinds: ClassVar[tuple[str, ...]] = ("text", "input_text", "output_text", "refusal")
    type: str
    text: Text | None = Field(default=None, validation_alias=AliasChoices("text", "refusal"))

    @model_validator(mode="after")
    def _is_text(self) -> TextPart:
        if self.type not in self.kinds:
            raise PydanticCustomError(
                "unsupported", "content parts other than text are not supported; type should be 'text'"
            )
        return self


def _content_kind(content: Any) -> str:
    return "parts" if isinstance(content, list) else "one text"


TextParts = Annotated[list[TextPart], Field(fail_fast=True), at_most(MAX_PARTS, "content parts")]
Content = Annotated[Annotated[Text, Tag("one text")] | Annotated[TextParts, Tag("parts")], Discriminator(_content_kind)]


def content_text(content: str | list[TextPart] | None) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(part.text or "" for part in content or ())


Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class ChatMessage(Body):
    """One turn, with the fields that clients copy from an earlier response."""

    neutral = neutral_fields.MESSAGE
    no_effect = neutral_fields.NO_EFFECT_MESSAGE
    role: Role
    content: Content | None = None
    name: str | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: Annotated[list[dict[str, Any]], at_most(MAX_PARTS, "tool calls")] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None

    def turn(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        calls = self.tool_calls or (
            [{"type": "function", "function": self.function_call}] if self.function_call else []
        )
        fields = {
            "name": self.name,
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_calls": [_with_arguments(call) for call in calls],
            "tool_call_id": self.tool_call_id,
        }
        return {"role": role, "content": content_text(self.content)} | {
            name: value for name, value in fields.items() if value
        }


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The API sends a call's arguments as JSON text; templates expect the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}}


def _schema_of_object(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """The parts of a function's schema that every form of calls reads; compilation checks the rest."""
    given = schema or {}
    properties, required = given.get("properties", {}), given.get("required", [])
    if given.get("type", "object") != "object":
        raise PydanticCustomError("schema", "type should be 'object'")
    if not isinstance(properties, dict) or not all(isinstance(part, dict | bool) for part in properties.values()):
        raise PydanticCustomError("schema", "properties should be an object with a schema for each name")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise PydanticCustomError("schema", "required should be a list of names")
    return schema


class FunctionDefinition(Body):
    """parameters: the JSON schema of the arguments. strict: refuse a schema with keywords that cannot be enforced."""

    # As OpenAI's, with some characters that MCP servers use.
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
    description: Text | None = None
    parameters: Annotated[dict[str, Any] | None, AfterValidator(_schema_of_object)] = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """A function without parameters has none."""
        return {"properties": {}} if self.parameters is None else self.parameters


class ToolDefinition(Body):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


def _choice_kind(choice: Any) -> str:
    return "a named tool" if isinstance(choice, dict) else "a choice"


ToolChoiceField = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a choice")] | Annotated[NamedTool, Tag("a named tool")],
    Discriminator(_choice_kind),
]


class ConversationBody(PromptBody):
    """The fields that decide the prompt of a chat."""

    neutral = neutral_fields.CONVERSATION
    prompt_field = "messages"
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1), at_most(MAX_MESSAGES, "messages")]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], at_most(MAX_PARTS, "documents")] | None = None
    reasoning_effort: Annotated[Effort | None, BeforeValidator(lambda effort: effort or None)] = None
    tools: Annotated[list[ToolDefinition], Field(fail_fast=True), at_most(MAX_TOOLS, "tools")] | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    # The older names of tools and tool_choice.
    functions: Any = None
    function_call: Any = None

    @model_validator(mode="after")
    def _has_consistent_tools(self) -> ConversationBody:
        if self.function_call not in (None, "none", "auto"):
            raise unsupported("function_call", "send tools and tool_choice instead")
        if self.functions not in (None, []) and self.function_call != "none":
            raise unsupported("functions", "send tools instead; function_call 'none' leaves functions out")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise unsupported("tools", "two functions have the same name")
        if self.tool_choice == "required" and not names:
            raise unsupported("tool_choice", "required needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise unsupported("tool_choice", "it names a function that is not among the tools")
        if self.add_generation_prompt and self.continue_final_message:
            raise unsupported("continue_final_message", "it cannot be combined with add_generation_prompt")
        return self

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template; None if there are none, or none may be called."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    def callable_tools(self) -> ToolChoice | None:
        """What the response may or must call; None for no calls."""
        if not self.tools or self.tool_choice == "none":
            return None
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        functions = [tool.function for tool in self.tools if named in (None, tool.function.name)]
        return ToolChoice(
            tools=[Tool(each.name, closed(each.schema_of_arguments), strict=bool(each.strict)) for each in functions],
            required=named is not None or self.tool_choice == "required",
            parallel=named is None and self.parallel_tool_calls is not False,
        )

    @property
    def generation_prompt(self) -> bool:
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    def template_variables(self, enable_thinking: bool | None) -> dict[str, Any]:
        """Variables of the chat template. ``enable_thinking``: the server's default; None: the template's own.

        ``reasoning_effort`` ``none`` and ``minimal`` turn thinking off, every other effort turns it on.
        """
        given = dict(self.chat_template_kwargs or {})
        if given.get("enable_thinking", enable_thinking) is None:
            given.pop("enable_thinking", None)
        if self.reasoning_effort is not None:
            enable_thinking = self.reasoning_effort not in ("none", "minimal")
            given.setdefault("reasoning_effort", self.reasoning_effort)
        if enable_thinking is not None:
            given.setdefault("enable_thinking", enable_thinking)
        return given


class ChatCompletionRequest(ConversationBody, DecodingBody):
    neutral = {**neutral_fields.CONVERSATION, **neutral_fields.DECODING, **neutral_fields.CHAT}
    max_completion_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None


class CompletionRequest(DecodingBody):
    neutral = {**neutral_fields.DECODING, **neutral_fields.COMPLETION}
    prompt_field = "prompt"
    prompt: Prompt
    logprobs: Annotated[LogprobCount | None, BeforeValidator(_no_logprobs)] = None
    best_of: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    prompt_logprobs: Annotated[LogprobCount | None, BeforeValidator(_no_logprobs)] = None
    add_special_tokens: bool | None = None

    @property
    def listed_prompt_logprobs(self) -> int | None:
        """Alternatives of each prompt token: as ``prompt_logprobs``, or as ``echo`` with ``logprobs``."""
        echoed = self.logprobs if self.echo else None
        counts = [count for count in (self.prompt_logprobs, echoed) if count is not None]
        return max(counts, default=None)

    @property
    def echoes_alone(self) -> bool:
        """Whether the response is the prompt alone: ``echo`` with ``max_tokens`` 0, which scores a text."""
        return bool(self.echo) and self.max_tokens == 0


class ChatTokenizeRequest(ConversationBody):
    return_token_strs: bool | None = None


class TextTokenizeRequest(PromptBody):
    prompt_field = "prompt"
    prompt: Text
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


def _tokenize_kind(body: Any) -> str:
    return "chat body" if isinstance(body, dict) and "messages" in body else "completion body"


TokenizeRequest = Annotated[
    Annotated[ChatTokenizeRequest, Tag("chat body")] | Annotated[TextTokenizeRequest, Tag("completion body")],
    Discriminator(_tokenize_kind),
]


class DetokenizeRequest(PromptBody):
    prompt_field = "tokens"
    tokens: Annotated[list[TokenId], Field(fail_fast=True), at_most(MAX_PROMPT_TOKENS, "tokens")]
