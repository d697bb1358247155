"""Response bodies of the OpenAI API, with TriMode's additional fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ResponseBody(BaseModel):
    """Written without the fields that were not set."""

    def json_text(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class NamedEvent(ResponseBody):
    """A server-sent event with its type as name; which other fields are set depends on it."""

    type: str

    def event_text(self) -> str:
        return f"event: {self.type}\ndata: {self.json_text()}\n\n"


class PromptTokensDetails(ResponseBody):
    cached_tokens: int


class CompletionTokensDetails(ResponseBody):
    """Drafted tokens that were emitted are accepted predictions."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(ResponseBody):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class PassCounts(ResponseBody):
    """Passes of a choice so far by kind, cycles, drafted, accepted and copied tokens
    (``trimode.runtime.request.outputs.Counts``).
    """

    prefill: int
    draft: int
    denoise: int
    commit: int
    cycles: int
    drafted: int
    accepted: int
    trees: int
    lookups: int
    copied: int
    accepted_copies: int


class DraftedCycle(ResponseBody):
    """A cycle and its drafts (``trimode.runtime.request.outputs.Cycle`` and ``DraftRecord``).

    pieces: the text of each verified token, pending token first. parents: None for a chain. reason: one line.
    """

    drafting: str
    drafted: int
    verified: int
    expected: float
    emitted: int
    pieces: list[str]
    parents: list[int] | None
    path: list[int]
    reason: str


class TokenOrigins(ResponseBody):
    """The tokens of a choice or chunk.

    pieces: the text of each token. origins: how each token was produced. rejected: drafted tokens that were rejected.
    cycles: those of the choice or chunk, whose tokens are its tokens without the prefill's; empty in diffusion. passes:
    counts of the whole choice so far.
    """

    pieces: list[str]
    origins: list[str]
    rejected: list[str]
    cycles: list[DraftedCycle]
    passes: PassCounts


class TopLogprob(ResponseBody):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseBody):
    content: list[TokenLogprob]


FinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCall(ResponseBody):
    """arguments: JSON text."""

    name: str
    arguments: str


class ToolCall(ResponseBody):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(ResponseBody):
    """content: None if the message is tool calls only."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(ResponseBody):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None
    trimode: TokenOrigins | None = None


class ChatCompletion(ResponseBody):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionCallDelta(ResponseBody):
    """arguments: JSON text that continues that of the earlier deltas."""

    name: str | None = None
    arguments: str


class ToolCallDelta(ResponseBody):
    """The first delta of a call has its id, type and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class Delta(ResponseBody):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(ResponseBody):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    trimode: TokenOrigins | None = None


class ChatCompletionChunk(ResponseBody):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(ResponseBody):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(ResponseBody):
    """In vLLM's shape. rank: None outside the engine's candidates."""

    logprob: float
    rank: int | None
    decoded_token: str


class CompletionChoice(ResponseBody):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    finish_reason: FinishReason | None = None
    trimode: TokenOrigins | None = None


class Completion(ResponseBody):
    """A whole response, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ServedModel(ResponseBody):
    """``root``: the name without the suffix of an alias. ``max_model_len``: tokens of prompt and completion."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(ResponseBody):
    object: Literal["list"]
    data: list[ServedModel]


class Health(ResponseBody):
    status: Literal["ok"]


class Tokenized(ResponseBody):
    """``token_strs``: the vocabulary's text of each token, if requested."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(ResponseBody):
    prompt: str


class TokenizerInfo(ResponseBody):
    """The checkpoint's ``tokenizer_config.json`` and its chat template."""

    model_config = ConfigDict(extra="allow")
    tokenizer_class: str
    chat_template: Any = None


class Version(ResponseBody):
    version: str


class ErrorDetail(ResponseBody):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ResponseBody):
    error: ErrorDetail


class MessagesError(ResponseBody):
    type: str
    message: str


class MessagesErrorBody(ResponseBody):
    """An error of Anthropic's API."""

    type: Literal["error"]
    error: MessagesError
