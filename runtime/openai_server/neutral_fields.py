"""Request fields that clients send and this server does not implement, with the values that request nothing.

A neutral value (or null) is accepted. Any other value is refused with the reason, because ignoring it would give a
response that the client did not ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Neutral(NamedTuple):
    """``reason``: why other values than ``values`` are refused."""

    reason: str
    values: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        return value is None or any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in self.values
        )


_NO_BEAMS = "beam search is not supported"
_TEXT_ONLY = "this server reads and writes text only"

STREAM_OPTIONS: Mapping[str, Neutral] = {
    "include_obfuscation": Neutral("padding of stream events is not supported", (False,)),
}
DECODING: Mapping[str, Neutral] = {
    "cache_salt": Neutral("salts of the prefix cache are not supported", ("",)),
    "early_stopping": Neutral(_NO_BEAMS, (False,)),
    "logits_processors": Neutral("logits processors are not supported", ([],)),
    "return_token_ids": Neutral("token ids are not returned", (False,)),
    "return_tokens_as_token_ids": Neutral("token ids are not returned", (False,)),
    "service_tier": Neutral("there is one service tier", ("auto", "default")),
    "store": Neutral("responses are not stored", (False,)),
    "truncate_prompt_tokens": Neutral("prompts are not truncated"),
    "use_beam_search": Neutral(_NO_BEAMS, (False,)),
}
CONVERSATION: Mapping[str, Neutral] = {
    "chat_template": Neutral("the checkpoint's own chat template cannot be replaced"),
    "mm_processor_kwargs": Neutral(_TEXT_ONLY, ({},)),
}
CHAT: Mapping[str, Neutral] = {
    "prompt_logprobs": Neutral("log-probabilities of the prompt are supported by /v1/completions only", (False,)),
    "audio": Neutral(_TEXT_ONLY, ({},)),
    "echo": Neutral("echo is supported by /v1/completions only", (False,)),
    "include_reasoning": Neutral("reasoning cannot be left out", (True,)),
    "modalities": Neutral(_TEXT_ONLY, (["text"], [])),
    "prediction": Neutral("predicted output is not supported", ({},)),
    "separate_reasoning": Neutral("reasoning is always separate", (True,)),
    "verbosity": Neutral("verbosity is not supported", ("medium",)),
    "web_search_options": Neutral("web search is not supported"),
}
COMPLETION: Mapping[str, Neutral] = {
    "suffix": Neutral("insertion before a suffix is not supported", ("",)),
}
RESPONSES: Mapping[str, Neutral] = {
    "background": Neutral("responses in the background are not supported", (False,)),
    "context_management": Neutral("conversations are not compacted", ([],)),
    "conversation": Neutral("conversations are not stored; send the whole conversation as input"),
    "max_tokens": Neutral("its name here is max_output_tokens"),
    "max_tool_calls": Neutral("there are no built-in tools"),
    "n": Neutral("there is one response", (1,)),
    "previous_response_id": Neutral("responses are not stored; send the whole conversation as input"),
    "prompt": Neutral("stored prompts are not supported"),
    "response_format": Neutral("its name here is text.format"),
    "top_logprobs": Neutral("log-probabilities are supported by /v1/chat/completions", (0,)),
    "truncation": Neutral("conversations are not truncated", ("disabled",)),
}
RESPONSES_TEXT: Mapping[str, Neutral] = {"verbosity": CHAT["verbosity"]}
RESPONSES_REASONING: Mapping[str, Neutral] = {
    "generate_summary": Neutral("reasoning is returned whole", ("auto",)),
    "summary": Neutral("reasoning is returned whole", ("auto",)),
}
MESSAGES: Mapping[str, Neutral] = {
    "container": Neutral("there are no built-in tools"),
    "context_management": RESPONSES["context_management"],
    "max_completion_tokens": Neutral("its name here is max_tokens"),
    "mcp_servers": Neutral("there are no built-in tools", ([],)),
    "n": RESPONSES["n"],
    "response_format": Neutral("its name here is output_config.format"),
    "service_tier": Neutral("there is one service tier", ("auto", "standard_only")),
    "stop": Neutral("its name here is stop_sequences"),
}
MESSAGE: Mapping[str, Neutral] = {"audio": Neutral(_TEXT_ONLY)}

# Accepted with any value: they do not change the response.
NO_EFFECT_DECODING = frozenset(
    {
        "cache_prompt",
        "metadata",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "spaces_between_special_tokens",
        "user",
    }
)
NO_EFFECT_MESSAGE = frozenset({"annotations", "cache_control", "id", "refusal", "status", "type"})
NO_EFFECT_BLOCK = frozenset({"cache_control", "caller", "citations", "data", "is_error", "signature"})
NO_EFFECT_ITEM = frozenset({"encrypted_content", "id", "phase", "status"})
NO_EFFECT_PART = frozenset({"annotations", "cache_control", "id", "logprobs"})
