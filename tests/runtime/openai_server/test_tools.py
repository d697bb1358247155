"""Tool calls: forced ones by the shipped model, and those that a scripted answer chooses to make."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.support.scripted_llm import ScriptedLLM
from trimode.model.tokenizer import Tokenizer
from trimode.runtime.openai_server.app import create_app
from trimode.runtime.openai_server.request_bodies import ChatCompletionRequest
from trimode.runtime.openai_server.service import Service
from trimode.runtime.request.outputs import FinishReason

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "What is the weather?"}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": PARAMETERS}}
NOW = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
TOOLS = [WEATHER, NOW]
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'


def deltas(text: str) -> tuple[list[dict[str, Any]], str | None]:
    """The deltas of a streamed choice, and its finish_reason."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events if event["choices"]]
    # OpenAI's client does not report the end of a call whose last arguments come with the finish_reason.
    assert not any(choice["delta"].get("tool_calls") and choice["finish_reason"] for choice in choices)
    return [choice["delta"] for choice in choices], choices[-1]["finish_reason"]


def streamed_calls(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls, joined. Checks that content does not come behind them, and that each call begins with its name."""
    calls: list[dict[str, Any]] = []
    for delta in found:
        assert not (calls and delta.get("content"))
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["type"] == "function"
                calls.append({"id": call["id"], **call["function"]})
            else:
                assert call.keys() == {"index", "function"}
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return calls


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "auto"])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_required_call_is_a_valid_call(http: httpx.Client, choice: Any, mode: str) -> None:
    tools = TOOLS if choice == NAMED else [WEATHER]
    fields = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 120, "mode": mode}
    body = {"messages": [USER], **fields}
    whole = http.post(CHAT, json=body).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    (call,) = whole["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)
    found, finish_reason = deltas(http.post(CHAT, json=body | {"stream": True}).text)
    (streamed,) = streamed_calls(found)
    assert finish_reason == "tool_calls"
    assert streamed["id"].startswith("call_")
    assert {name: streamed[name] for name in ("name", "arguments")} == call["function"]
    assert len(found) > 3


CHOICES: list[tuple[dict[str, Any], tuple[list[str], bool, bool] | None]] = [
    ({}, (["weather", "now"], False, True)),
    ({"tool_choice": "auto", "parallel_tool_calls": True}, (["weather", "now"], False, True)),
    ({"tool_choice": "auto", "parallel_tool_calls": False}, (["weather", "now"], False, False)),
    ({"tool_choice": "required"}, (["weather", "now"], True, True)),
    ({"tool_choice": "required", "parallel_tool_calls": False}, (["weather", "now"], True, False)),
    ({"tool_choice": NAMED}, (["weather"], True, False)),
    ({"tool_choice": "none"}, None),
    ({"tools": []}, None),
]


@pytest.mark.parametrize(("fields", "expected"), CHOICES)
def test_what_each_choice_allows(fields: dict[str, Any], expected: tuple[list[str], bool, bool] | None) -> None:
    """Functions, whether a call is required, and whether there may be several; the grammar follows from it."""
    body = ChatCompletionRequest.model_validate({"messages": [USER], "tools": TOOLS, **fields})
    choice = body.callable_tools
    found = choice and ([tool.name for tool in choice.tools], choice.required, choice.parallel)
    assert found == expected
    assert (body.shown_tools is None) == (expected is None)


@pytest.mark.parametrize("fields", [{"max_thinking_tokens": 6}, {"logprobs": True}])
def test_calls_behind_a_thought_in_several_choices(http: httpx.Client, fields: dict[str, Any]) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    body = {
        "messages": [USER],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": True},
        "max_tokens": 300,
        "n": 2,
        "temperature": 0.5,
        "seed": 3,
        **fields,
    }
    choices = http.post(CHAT, json=body).json()["choices"]
    events = [
        json.loads(line[6:])
        for line in http.post(CHAT, json=body | {"stream": True}).text.splitlines()
        if line.startswith("data: {")
    ]
    assert len(choices) == 2
    for choice in choices:
        message = choice["message"]
        assert (choice["finish_reason"], message["content"]) == ("tool_calls", None)
        assert message["reasoning_content"]
        (call,) = message["tool_calls"]
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
        assert choice.get("logprobs", {"content": []}) == {"content": []}
        of_choice = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        (streamed,) = streamed_calls([each["delta"] for each in of_choice])
        assert streamed["arguments"] == call["function"]["arguments"]
        assert of_choice[-1]["finish_reason"] == "tool_calls"
        thought = "".join(each["delta"].get("reasoning_content", "") for each in of_choice)
        assert thought == message["reasoning_content"]


def test_arguments_that_are_not_declared_are_not_written(http: httpx.Client) -> None:
    """As LangChain describes functions; JSON Schema would allow any other property."""
    properties = {"city": {"enum": ["Paris", "Rome"], "type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    for described, expected in (({"parameters": parameters}, {"city"}), ({}, set())):
        body = {
            "messages": [USER],
            "tools": [{"type": "function", "function": {"name": "f", **described}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "max_tokens": 60,
        }
        (call,) = http.post(CHAT, json=body).json()["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]).keys() == expected


def test_a_history_with_the_call_and_its_result_is_answered(client: openai.OpenAI) -> None:
    tools: Any = TOOLS
    first = client.chat.completions.create(
        model="tiny", messages=[USER], tools=tools, tool_choice="required", max_tokens=200, parallel_tool_calls=False
    )
    message = first.choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    second = client.chat.completions.create(model="tiny", messages=[USER, message, result], tools=tools, max_tokens=8)
    assert second.choices[0].message.content
    assert second.choices[0].message.tool_calls is None


def test_the_client_parses_the_arguments_of_a_strict_tool(client: openai.OpenAI) -> None:
    strict: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    parsed = client.chat.completions.parse(
        model="tiny", messages=[USER], tools=[strict], tool_choice="required", parallel_tool_calls=False, max_tokens=120
    )
    calls = parsed.choices[0].message.tool_calls
    assert calls is not None
    jsonschema.validate(calls[0].function.parsed_arguments, PARAMETERS)


def test_a_call_that_is_cut_off(http: httpx.Client) -> None:
    """Whole, it is content; in a stream, its beginning has been sent."""
    body = {"messages": [USER], "tools": [WEATHER], "tool_choice": "required", "max_tokens": 28}
    whole = http.post(CHAT, json=body).json()["choices"][0]
    assert whole["finish_reason"] == "length"
    assert "tool_calls" not in whole["message"]
    assert whole["message"]["content"].startswith('<tool_call>\n{"name": "weather", "arguments": {')
    found, finish_reason = deltas(http.post(CHAT, json=body | {"stream": True}).text)
    (call,) = streamed_calls(found)
    assert finish_reason == "length"
    assert whole["message"]["content"].endswith(call["arguments"])


def test_content_in_a_format_or_calls(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    body = {"messages": [USER], "tools": TOOLS, "max_tokens": 200, "guided_json": schema}
    message = http.post(CHAT, json=body).json()["choices"][0]["message"]
    if "tool_calls" not in message:
        jsonschema.validate(json.loads(message["content"]), schema)


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [WEATHER, {"type": "function", "function": {"name": "f", **fields}}]}


def schema(**keywords: Any) -> dict[str, Any]:
    return function(parameters={"type": "object", "properties": {"a": keywords}})


# What is sent beside the messages; the field that the error names, and its message.
BAD_TOOLS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no name": ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "Field required"),
    "a name with spaces": (function(name="a b"), "tools.1.function.name", "match pattern"),
    "a long name": (function(name="a" * 129), "tools.1.function.name", "match pattern"),
    "a name instead of a tool": ({"tools": ["f"]}, "tools.0", "tools.0: Input should be an object"),
    "diffusion": ({"tools": TOOLS, "mode": "diffusion"}, "tools", "it needs mode linear_spec, auto or ar"),
    "diffusion, by name": ({"tools": TOOLS, "model": "tiny:diffusion"}, "tools", "it needs mode linear_spec"),
    "no function": ({"tools": [{"type": "function"}]}, "tools.0.function", "Field required"),
    "another type": ({"tools": [{"type": "web_search"}]}, "tools.0.type", "should be 'function'"),
    "tools that are no list": ({"tools": {"type": "function"}}, "tools", "list"),
    "too many": ({"tools": [WEATHER] * 129}, "tools", "129 tools were sent; the limit is 128"),
    "the same name twice": ({"tools": [WEATHER, WEATHER]}, "tools", "same name"),
    "a schema as text": (function(parameters="{}"), "tools.1.function.parameters", "should be an object"),
    "a schema of a text": (function(parameters={"type": "string"}), "tools.1.function.parameters", "'object'"),
    "properties in a list": (function(parameters={"properties": []}), "tools.1.function.parameters", "for each name"),
    "required as text": (function(parameters={"required": "a"}), "tools.1.function.parameters", "list of names"),
    "an unknown type": (schema(type="foo"), "tools", "the parameters of f: json cannot be compiled: Invalid type: foo"),
    "an enum of nothing": (schema(enum=5), "tools", "the parameters of f: json cannot be compiled: enum must be"),
    "a reference to nothing": (schema(**{"$ref": "#/$defs/b"}), "tools", "does not exist"),
    "a strict keyword": (
        function(strict=True, parameters={"type": "object", "not": {}}),
        "tools",
        'the parameters of f: json cannot be compiled: Unimplemented keys: ["not"]',
    ),
    "an unknown choice": ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
    "an unknown tool": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        "it names a function that is not among the tools",
    ),
    "a choice of allowed tools": (
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
        "tool_choice.type",
        "should be 'function'",
    ),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice", "needs tools"),
}


@pytest.mark.parametrize("case", BAD_TOOLS)
def test_bad_tools_are_refused_in_one_clear_line(http: httpx.Client, case: str) -> None:
    fields, param, message = BAD_TOOLS[case]
    refused = http.post(CHAT, json={"messages": [USER], **fields})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]
    assert error["message"].startswith(param)
    assert "\n" not in error["message"]
    assert len(error["message"]) < 250


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_checkpoint)


def ask(llm: ScriptedLLM, body: dict[str, Any], parser: str | None = None) -> httpx.Response:
    async def post() -> httpx.Response:
        app = create_app(Service(llm.as_engine, "scripted", 60, tool_call_parser=parser))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://scripted") as found:
            return await found.post(CHAT, json=body)

    response = asyncio.run(post())
    assert response.status_code == 200, response.text
    return response


SCRIPTS: list[tuple[list[str], FinishReason, str | None, int, str]] = [
    (["Let me", " see.\n<tool", CALL[5:30], CALL[30:]], "stop", "Let me see.", 1, "tool_calls"),
    ([CALL, "\n", CALL], "stop", None, 2, "tool_calls"),
    (["Just ", "text <tool", " that"], "stop", "Just text <tool that", 0, "stop"),
    ([CALL, "\n", CALL[:40]], "length", None, 1, "length"),
    (["Text ", CALL[:16]], "length", "Text " + CALL[:16], 0, "length"),
]


@pytest.mark.parametrize(("pieces", "ended", "content", "count", "finish_reason"), SCRIPTS)
def test_answers_that_may_call(
    tokenizer: Tokenizer, pieces: list[str], ended: FinishReason, content: str | None, count: int, finish_reason: str
) -> None:
    llm = ScriptedLLM(tokenizer, pieces, ended)
    body = {"messages": [USER], "tools": TOOLS, "tool_choice": "auto"}
    choice = ask(llm, body).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (content, finish_reason)
    calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
    assert calls == [{"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}] * count
    assert llm.params.guided_decoding is not None
    assert llm.grammars == [llm.params.guided_decoding]
    found, streamed_reason = deltas(ask(llm, body | {"stream": True}).text)
    streamed = streamed_calls(found)
    assert "".join(delta.get("content") or "" for delta in found) == (content or "")
    assert streamed_reason == finish_reason
    assert [{key: call[key] for key in ("name", "arguments")} for call in streamed[:count]] == calls
    assert len({call["id"] for call in streamed}) == len(streamed)


def test_the_parser_is_chosen(tokenizer: Tokenizer) -> None:
    text = '<TOOLCALL>[{"name": "now", "arguments": {}}]</TOOLCALL>'
    body = {"messages": [USER], "tools": TOOLS}
    called = ask(ScriptedLLM(tokenizer, [text]), body, "nemotron").json()["choices"][0]
    assert called["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert ask(ScriptedLLM(tokenizer, [text]), body).json()["choices"][0]["message"]["content"] == text


def test_tools_that_may_not_be_called_are_no_rule(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, [CALL])
    choice = ask(llm, {"messages": [USER], "tools": TOOLS, "tool_choice": "none"}).json()["choices"][0]
    assert choice["message"]["content"] == CALL
    assert llm.params.guided_decoding is None
