"""``/v1/messages``, read with the official client's own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest
from anthropic.types import Message, TextBlock, ThinkingBlock, ToolUseBlock

from scripts.serving.server_process import KEY, Served

MESSAGES = "/v1/messages"
QUESTION = "What is 60% of 440?"
ANSWER = "10% of 440 is 44. Ones: 4x6=24, carry 2. Tens: 4x6=24, 24+2=26. So 60% of 440 is 264."
ASKED: Any = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": QUESTION}]}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
FORCED: Any = {
    "tools": [{"name": "weather", "description": "Weather.", "input_schema": SCHEMA}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
}


@pytest.fixture
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as found:
        yield found


def strictly(response: httpx.Response) -> Message:
    assert response.status_code == 200, response.text
    return Message.model_validate(response.json())


def text_of(message: Message) -> str:
    (block,) = message.content
    assert isinstance(block, TextBlock)
    return block.text


def streamed(client: anthropic.Anthropic, **fields: Any) -> tuple[list[str], Message]:
    """The types of the events, without repetition, and the message that the client builds of them."""
    with client.messages.stream(**fields) as stream:
        raw = [event.type for event in stream if hasattr(type(event), "model_fields")]
        kinds = [kind for kind in raw if kind.startswith(("message_", "content_block_"))]
        return [kind for at, kind in enumerate(kinds) if at == 0 or kinds[at - 1] != kind], stream.get_final_message()


def test_a_text(http: httpx.Client) -> None:
    found = strictly(http.post(MESSAGES, json=ASKED | {"metadata": {"user_id": "a"}, "system": "Be short."}))
    assert (found.stop_reason, found.stop_sequence, found.model, found.role) == ("end_turn", None, "tiny", "assistant")
    assert text_of(found)
    assert found.usage.input_tokens > 0
    assert found.usage.output_tokens > 0


def test_a_streamed_text(claude: anthropic.Anthropic) -> None:
    kinds, found = streamed(claude, **ASKED)
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert (text_of(found), found.stop_reason) == (ANSWER, "end_turn")
    whole = claude.messages.create(**ASKED)
    assert text_of(whole) == ANSWER
    assert found.usage.output_tokens == whole.usage.output_tokens


def test_why_a_text_ends(claude: anthropic.Anthropic) -> None:
    cut = claude.messages.create(**ASKED | {"max_tokens": 4})
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 4)
    stopped = claude.messages.create(**ASKED, stop_sequences=["carry"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "carry")
    assert text_of(stopped) == ANSWER.partition("carry")[0]
    _, last = streamed(claude, **ASKED, stop_sequences=["carry"])
    assert (last.stop_reason, last.stop_sequence) == ("stop_sequence", "carry")


def test_a_last_turn_of_the_assistant_is_continued(claude: anthropic.Anthropic) -> None:
    begun = [*ASKED["messages"], {"role": "assistant", "content": "10% of 440 is"}]
    assert text_of(claude.messages.create(**ASKED | {"messages": begun})) == ANSWER.removeprefix("10% of 440 is")


def test_a_call_and_its_result(claude: anthropic.Anthropic) -> None:
    found = claude.messages.create(**ASKED, **FORCED)
    (call,) = found.content
    assert isinstance(call, ToolUseBlock)
    assert (call.name, found.stop_reason) == ("weather", "tool_use")
    jsonschema.validate(call.input, SCHEMA)
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    turns: Any = [
        *ASKED["messages"],
        {"role": "assistant", "content": found.content},
        {"role": "user", "content": [result, {"type": "text", "text": "Thanks."}]},
    ]
    again = claude.messages.create(**ASKED | {"messages": turns, "max_tokens": 8}, tools=FORCED["tools"])
    assert again.usage.input_tokens > found.usage.input_tokens


def test_a_streamed_call(claude: anthropic.Anthropic) -> None:
    _, found = streamed(claude, **ASKED, **FORCED)
    (call,) = found.content
    assert isinstance(call, ToolUseBlock)
    assert found.stop_reason == "tool_use"
    jsonschema.validate(call.input, SCHEMA)


def test_a_thought_is_a_block_of_its_own(claude: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 8}
    whole = claude.messages.create(**ASKED, thinking=thinking)
    _, found = streamed(claude, **ASKED, thinking=thinking)
    for message in (whole, found):
        assert isinstance(message.content[0], ThinkingBlock)
        assert message.content[0].thinking
    assert [block.to_dict() for block in whole.content] == [block.to_dict() for block in found.content]


def test_a_format(http: httpx.Client) -> None:
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    jsonschema.validate(
        json.loads(text_of(strictly(http.post(MESSAGES, json=ASKED | {"output_config": form})))), SCHEMA
    )


def test_tokens_are_counted_as_they_are_used(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model="tiny", messages=ASKED["messages"], system="Be short.")
    usage = claude.messages.create(**ASKED | {"max_tokens": 1}, system="Be short.").usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://a/b.png"}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "blocks of type image are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id: Field required"),
        ({"stop": ["a"]}, "its name here is stop_sequences"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: required needs tools"),
        ({"tool_choice": {"type": "tool"}}, "a choice of type tool needs it"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format"),
        ({"mcp_servers": [{"type": "url"}]}, "there are no built-in tools"),
    ],
)
def test_what_is_refused(http: httpx.Client, changes: dict[str, Any], reason: str) -> None:
    refused = http.post(MESSAGES, json=ASKED | changes)
    assert refused.status_code == 400, refused.text
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert reason in refused.json()["error"]["message"]


def test_errors_are_those_of_the_client(served: Served, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match=r"not_found_error.*does not exist"):
        claude.messages.create(**ASKED | {"model": "other"})
    with pytest.raises(anthropic.NotFoundError, match="message batches are not offered"):
        claude.messages.batches.list()
    with (
        anthropic.Anthropic(base_url=served.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError, match="authentication_error"),
    ):
        stranger.messages.create(**ASKED)
