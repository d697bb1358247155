"""openai for Python: tools, parse, the stream helpers, and /v1/responses."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field

QUESTION: Any = [{"role": "user", "content": "What is the weather in Rome?"}]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


class Sky(BaseModel):
    sunny: bool
    wind: Literal["none", "some", "much"]


def chats(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    asked: Any = {"model": "tiny", "messages": QUESTION, "tools": tools, "tool_choice": "required"}
    one = asked | {"parallel_tool_calls": False}
    message = client.chat.completions.create(**one).choices[0].message
    (call,) = message.tool_calls or ()
    assert call.type == "function"
    Weather.model_validate_json(call.function.arguments)
    parsed = client.chat.completions.parse(**one).choices[0].message.tool_calls
    assert parsed is not None
    assert isinstance(parsed[0].function.parsed_arguments, Weather)
    with client.chat.completions.stream(**one) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert final.message.tool_calls is not None
    assert isinstance(final.message.tool_calls[0].function.parsed_arguments, Weather)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    after = client.chat.completions.create(model="tiny", messages=[*QUESTION, message, result], tools=tools)
    assert after.choices[0].finish_reason == "stop"
    assert after.choices[0].message.content
    sky = client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Sky)
    assert isinstance(sky.choices[0].message.parsed, Sky)
    with client.chat.completions.stream(model="tiny", messages=QUESTION, response_format=Sky) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Sky)


def responses(client: openai.OpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather)]
    flat: Any = [{"type": "function", **tool["function"]} for tool in tools]
    asked: Any = {"model": "tiny", "input": QUESTION, "tools": flat, "tool_choice": "required"}
    one = asked | {"parallel_tool_calls": False}
    first = client.responses.create(**one)
    (call,) = first.output
    assert call.type == "function_call"
    Weather.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps({"sky": "clear"})}
    history: Any = [*QUESTION, *first.output, result]
    assert client.responses.create(model="tiny", input=history, tools=flat).output_text
    with client.responses.stream(**one) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output[0].type == "function_call"
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    sky = client.responses.parse(model="tiny", input=QUESTION, text_format=Sky)
    assert isinstance(sky.output_parsed, Sky)
    with client.responses.stream(model="tiny", input=QUESTION, text_format=Sky) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Sky)
    thoughtful = client.responses.create(model="tiny", input="What is 60% of 440?", reasoning={"effort": "low"})
    assert [item.type for item in thoughtful.output] == ["reasoning", "message"]


def main(url: str, key: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    chats(client)
    responses(client)
    try:
        client.responses.create(model="tiny", input="And then?", previous_response_id="resp_1")
    except openai.BadRequestError as error:
        field = error.param
    else:
        raise AssertionError("previous_response_id was not refused")
    assert field == "previous_response_id"


if __name__ == "__main__":
    main(*sys.argv[1:])
