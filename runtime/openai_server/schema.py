"""Bodies and answers of OpenAI's API, with TriMode's fields beside OpenAI's.

A field that is unknown here, or whose value cannot be honoured, is refused; ``null`` means the default. A field of
OpenAI's for what is not here may have the values that ask for nothing. Fields that ``SamplingParams`` knows have its
names and rules; what is checked here as well is what a server must bound.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from trimode.model.chat_template import Message
from trimode.runtime.request.sampling_params import Denoising, Mode, SamplingParams

SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
MAX_CHOICES = 128
# As OpenAI has it.
MAX_MESSAGES = 2048
MAX_PARTS = 64
MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 1 << 20
# Of one object of a body; more than any has.
MAX_FIELDS = 100
TOO_MANY_FIELDS = "too_many_fields"
# OpenAI's own default for /v1/completions.
COMPLETION_TOKENS = 16

# What is told where such a field asks for more than nothing.
LACKING = {
    "audio": "this server neither hears nor speaks",
    "best_of": "this server gives all answers that it writes; ask for n",
    "echo": "this server does not repeat the prompt",
    "function_call": "this server calls no functions",
    "functions": "this server calls no functions",
    "include_obfuscation": "this server does not pad its events",
    "logit_bias": "this server biases no tokens",
    "modalities": "this server writes text alone",
    "prediction": "this server takes no predicted text; its drafts are its own",
    "reasoning_effort": "this server has no efforts; give chat_template_kwargs.enable_thinking and max_thinking_tokens",
    "response_format": "this server holds answers to no format but text",
    "service_tier": "this server has one tier",
    "store": "this server stores nothing",
    "suffix": "this server writes on from a prompt alone",
    "tool_calls": "this server calls no tools",
    "tool_choice": "this server calls no tools",
    "tools": "this server calls no tools",
    "verbosity": "this server has no measure of verbosity",
    "web_search_options": "this server searches nothing",
}


# Not ValueError: pydantic would keep it, with its frames, and so with the input and all that it was called by.
def _whole(text: str) -> str:
    """JSON can spell halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "Input should be valid Unicode, without lone surrogates") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NoList = Annotated[list[Any], Field(max_length=0)]
NoMap = Annotated[dict[str, Any], Field(max_length=0)]
StopString = Annotated[Text, Field(min_length=1, max_length=1000)]
# A list ends at its first wrong element: a finding costs far more than the element that it is about.
StopStrings = Annotated[list[StopString], Field(fail_fast=True, max_length=16)]
StopTokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=64)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPT_TOKENS)]
TokenIdLists = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, given: Any) -> Any:
        """One finding about all fields, not one about each."""
        if isinstance(given, dict) and len(given) > MAX_FIELDS:
            bounds = {"most": MAX_FIELDS, "count": len(given)}
            raise PydanticCustomError(TOO_MANY_FIELDS, "Input should have at most {most} fields, not {count}", bounds)
        return given


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Decoding(_Body):
    """What both endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Share | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | StopStrings | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: NoMap | None = None
    # Not OpenAI's: as vLLM and SGLang name them.
    top_k: Natural | None = None
    min_p: Share | None = None
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
    denoising: Denoising | None = None
    threshold: Share | None = None
    denoising_steps: Positive | None = None
    denoising_top_n: Positive | None = None
    max_thinking_tokens: Natural | None = None
    return_token_origins: bool | None = None

    def sampling_params(self, **ours: Any) -> SamplingParams:
        """Raises TriModeError that names the field, where values contradict each other."""
        given = self.model_dump(include=set(SAMPLING_FIELDS) - ours.keys(), exclude_none=True)
        if "seed" in given:
            given["seed"] %= 2**64
        return SamplingParams(**given, **{name: value for name, value in ours.items() if value is not None})

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    """A turn; fields that OpenAI's clients send back with an assistant's turn must be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)]
    name: str | None = None
    reasoning_content: str | None = None
    annotations: NoList | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: NoList | None = None

    def turn(self) -> Message:
        """As templates know it. What was thought before is not told to the model again."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatTemplateOptions(_Body):
    enable_thinking: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatCompletionRequest(_Decoding):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None
    # They ask nothing of the answer, and are not used.
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # They may ask for nothing.
    audio: None = None
    function_call: Literal["none", "auto"] | None = None
    functions: NoList | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, max_length=1)] | None = None
    prediction: None = None
    reasoning_effort: None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: NoList | None = None
    verbosity: None = None
    web_search_options: None = None

    @property
    def enable_thinking(self) -> bool | None:
        return None if self.chat_template_kwargs is None else self.chat_template_kwargs.enable_thinking


Prompt = Text | Texts | TokenIds | TokenIdLists


class CompletionRequest(_Decoding):
    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None


class Answer(BaseModel):
    """Written without the fields that were not set."""

    def json_text(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class PromptTokensDetails(Answer):
    cached_tokens: int


class CompletionTokensDetails(Answer):
    """OpenAI's names; drafts that were emitted are accepted predictions."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Passes(Answer):
    """What the answer cost so far: passes by kind, cycles, drafted and accepted tokens (``runtime.outputs.Counts``)."""

    prefill: int
    draft: int
    denoise: int
    commit: int
    cycles: int
    drafted: int
    accepted: int


class TokenOrigins(Answer):
    """Tokens of this answer or chunk, one by one: their text (joined, it is the text), how each came, the drafts that
    were rejected meanwhile, and the passes of the whole answer so far.
    """

    pieces: list[str]
    origins: list[str]
    rejected: list[str]
    passes: Passes


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]


FinishReason = Literal["stop", "length"]


class AssistantMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | None = None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None
    trimode: TokenOrigins | None = None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    trimode: TokenOrigins | None = None


class ChatCompletionChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    trimode: TokenOrigins | None = None


class Completion(Answer):
    """A whole answer, or a chunk of one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class Health(Answer):
    status: Literal["ok"]


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: ErrorDetail
