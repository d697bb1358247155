"""``/v1/responses``, read with the official client's own types."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage
from pydantic import BaseModel

RESPONSES = "/v1/responses"
QUESTION = "What is 60% of 440?"
ANSWER = "10% of 440 is 44. Ones: 4x6=24, carry 2. Tens: 4x6=24, 24+2=26. So 60% of 440 is 264."
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True, "description": "Weather."}
FORCED: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]
CALL_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
    "response.completed",
]


def strictly(response: httpx.Response) -> Response:
    assert response.status_code == 200, response.text
    return Response.model_validate(response.json())


def events_of(client: openai.OpenAI, **fields: Any) -> list[Any]:
    """Checks the numbers of the events, and each against its type."""
    events = list(client.responses.create(model="tiny", stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        type(event).model_validate(event.model_dump(by_alias=True))
    return events


def without_repetition(kinds: list[str]) -> list[str]:
    return [kind for place, kind in enumerate(kinds) if place == 0 or kinds[place - 1] != kind]


def test_a_text(http: httpx.Client) -> None:
    found = strictly(http.post(RESPONSES, json={"input": QUESTION, "metadata": {"a": "b"}, "store": False}))
    assert (found.output_text, found.status, found.model, found.metadata) == (ANSWER, "completed", "tiny", {"a": "b"})
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens


def test_a_streamed_text(client: openai.OpenAI) -> None:
    events = events_of(client, input=[{"role": "user", "content": QUESTION}])
    assert without_repetition([event.type for event in events]) == TEXT_EVENTS
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].response.output_text == ANSWER
    assert events[-1].response.usage.output_tokens > 0


def test_an_incomplete_text(http: httpx.Client, client: openai.OpenAI) -> None:
    found = strictly(http.post(RESPONSES, json={"input": QUESTION, "max_output_tokens": 4}))
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert isinstance(found.output[0], ResponseOutputMessage)
    assert found.output[0].status == "incomplete"
    assert events_of(client, input=QUESTION, max_output_tokens=4)[-1].type == "response.incomplete"


def test_a_conversation(client: openai.OpenAI) -> None:
    """The client sends back the items of an earlier response."""
    first = client.responses.create(model="tiny", input=QUESTION, instructions="Be short.")
    history: Any = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "Spell planet."}]
    assert client.responses.create(model="tiny", input=history).output_text


def test_a_call_and_its_result(http: httpx.Client, client: openai.OpenAI) -> None:
    found = strictly(http.post(RESPONSES, json={"input": "Weather?", **FORCED}))
    (call,) = found.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, call.status, found.status) == ("weather", "completed", "completed")
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    history: Any = [{"role": "user", "content": "Weather?"}, call, result]
    assert client.responses.create(model="tiny", input=history, tools=[TOOL], max_output_tokens=8).output_text


def test_a_streamed_call(client: openai.OpenAI) -> None:
    events = events_of(client, input="Weather?", **FORCED)
    assert without_repetition([event.type for event in events]) == CALL_EVENTS
    joined = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    (call,) = events[-1].response.output
    assert call.arguments == joined
    jsonschema.validate(json.loads(joined), PARAMETERS)
    names = {event.item_id for event in events if event.type.startswith("response.function_call")}
    assert names == {call.id}


def test_a_call_that_is_cut_off_is_an_incomplete_item(http: httpx.Client) -> None:
    found = strictly(http.post(RESPONSES, json={"input": "Weather?", "max_output_tokens": 28, **FORCED}))
    assert found.status == "incomplete"
    assert isinstance(found.output[0], ResponseFunctionToolCall)
    assert found.output[0].status == "incomplete"


class Sum(BaseModel):
    total: bool


def test_a_format_that_the_client_parses(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="tiny", input=QUESTION, text_format=Sum, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Sum)


def test_reasoning_is_an_item_of_its_own(client: openai.OpenAI) -> None:
    events = events_of(client, input=QUESTION, reasoning={"effort": "high"}, max_output_tokens=24)
    kinds = [item.type for item in events[-1].response.output]
    assert kinds[0] == "reasoning"
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert events[-1].response.output[0].content[0].text == thought
    history: Any = [
        {"role": "user", "content": QUESTION},
        *events[-1].response.output,
        {"role": "user", "content": "?"},
    ]
    assert client.responses.create(model="tiny", input=history, max_output_tokens=4).id


FORMAT = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
WRONG_FORMATS: list[tuple[dict[str, Any], str, str]] = [
    ({"text": {"format": {"type": "xml"}}}, "text.format", "type must be text, json_object"),
    ({"text": {"format": FORMAT | {"schema": {"type": "foo"}}}}, "text.format", "cannot be compiled"),
    ({"text": {"format": FORMAT}, "guided_regex": "a"}, "guided_regex", "cannot be combined with text.format"),
    ({"text": {"format": FORMAT}, "mode": "diffusion"}, "text.format", "it needs mode linear_spec, auto or ar"),
    ({"text": "json"}, "text", "should be an object"),
    ({"response_format": {"type": "json_object"}}, "response_format", "its name here is text.format"),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG_FORMATS)
def test_a_wrong_format_is_refused_under_its_name_here(
    http: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    refused = http.post(RESPONSES, json={"input": QUESTION, **fields})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}: ")
    assert message in error["message"]


REFUSED: dict[str, dict[str, Any]] = {
    "previous_response_id": {"previous_response_id": "resp_1"},
    "store": {"store": True},
    "background": {"background": True},
    "conversation": {"conversation": "conv_1"},
    "truncation": {"truncation": "auto"},
    "top_logprobs": {"top_logprobs": 2},
    "include": {"include": ["file_search_call.results"]},
    "tools.0": {"tools": [{"type": "web_search"}]},
    "tools.0.name": {"tools": [{"type": "function"}]},
    "tools.0.parameters": {"tools": [TOOL | {"parameters": {"type": "array"}}]},
    "tools": {"tools": [TOOL | {"parameters": {"type": "object", "properties": {"a": {"type": "foo"}}}}]},
    "tool_choice": {"tool_choice": "required"},
    "tool_choice.type": {"tools": [TOOL], "tool_choice": {"type": "file_search"}},
    "text.format": {"text": {"format": {"type": "json_schema", "name": "x"}}},
    "reasoning.effort": {"reasoning": {"effort": "extreme"}},
    "input": {"input": 5},
    "input.0.role": {"input": [{"content": "a"}]},
    "input.0.content.0": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
    "input.0": {"input": [{"type": "item_reference", "id": "msg_1"}]},
    "input.0.call_id": {"input": [{"type": "function_call_output", "output": "a"}]},
    "max_output_tokens": {"max_output_tokens": 0},
}


def test_an_input_that_is_too_long_is_refused_under_its_name_here(http: httpx.Client) -> None:
    error = http.post(RESPONSES, json={"input": "word " * 5000}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert "length of the input" in error["message"]


@pytest.mark.parametrize("param", REFUSED)
def test_refused_by_name(http: httpx.Client, param: str) -> None:
    refused = http.post(RESPONSES, json={"input": QUESTION} | REFUSED[param])
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert "\n" not in error["message"]
