"""Formats of responses and rules of tokens, as OpenAI's client, vLLM, SGLang and llama.cpp send them."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Describe a user as JSON."}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LARK, GBNF = 'start: "id-" /[0-9]{3}/', 'root ::= "id-" [0-9] [0-9] [0-9]'
NUMBER = r"id-[0-9]{3}"
FORMATS: dict[str, tuple[dict[str, Any], Any]] = {
    "response_format json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}},
        SCHEMA,
    ),
    "response_format json_object": ({"response_format": {"type": "json_object"}}, {"type": "object"}),
    "structured_outputs json": ({"structured_outputs": {"json": SCHEMA}}, SCHEMA),
    "structured_outputs regex": ({"structured_outputs": {"regex": NUMBER, "json": None}}, NUMBER),
    "structured_outputs choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    "guided_json": ({"guided_json": json.dumps(SCHEMA)}, SCHEMA),
    "guided_json_object": ({"guided_json_object": True}, {"type": "object"}),
    "guided_regex": ({"guided_regex": NUMBER}, NUMBER),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, "yes|no"),
    "guided_grammar": ({"guided_grammar": LARK}, NUMBER),
    "SGLang's json_schema": ({"json_schema": json.dumps(SCHEMA)}, SCHEMA),
    "SGLang's regex": ({"regex": NUMBER}, NUMBER),
    "SGLang's ebnf": ({"ebnf": GBNF}, NUMBER),
    "llama.cpp's grammar": ({"grammar": GBNF}, NUMBER),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", FORMATS)
def test_responses_have_the_requested_form(http: httpx.Client, case: str, stream: bool) -> None:
    fields, form = FORMATS[case]
    body = {"messages": [USER], "max_tokens": 120, "stream": stream} | fields
    response = http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert "x-trimode-ignored-fields" not in response.headers
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        content = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
        finish = [event["choices"][0]["finish_reason"] for event in events if event["choices"]][-1]
    else:
        choice = response.json()["choices"][0]
        content, finish = choice["message"]["content"], choice["finish_reason"]
    if form == {"type": "object"}:  # nothing bounds the length
        assert content.startswith("{")
        return
    assert finish == "stop"
    if isinstance(form, dict):
        jsonschema.validate(json.loads(content), form)
    else:
        assert re.fullmatch(form, content)


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "auto"])
def test_every_causal_mode_gives_the_same_response(http: httpx.Client, mode: str) -> None:
    body = {"prompt": "A user: ", "max_tokens": 100, "guided_json": SCHEMA}
    expected = http.post(COMPLETIONS, json=body | {"mode": "ar"}).json()["choices"][0]["text"]
    assert http.post(COMPLETIONS, json=body | {"mode": mode}).json()["choices"][0]["text"] == expected


def test_diffusion_is_refused_with_a_pointer(http: httpx.Client) -> None:
    refused = http.post(CHAT, json={"messages": [USER], "guided_json": SCHEMA, "mode": "diffusion"})
    assert refused.status_code == 400
    assert "guided_json: it needs mode linear_spec" in refused.json()["error"]["message"]


class Person(BaseModel):
    name: str
    age: int
    city: str
    hobby: str


def test_the_official_client_parses_a_pydantic_model(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": "Turn this into JSON: Ruben is 14, lives in Madrid and likes cycling."}],
        response_format=Person,
        max_tokens=150,
    )
    assert parsed.choices[0].message.parsed == Person(name="Ruben", age=14, city="Madrid", hobby="cycling")


def test_biases_allowed_and_banned_tokens_and_words_and_least_lengths(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "What is 60% of 440?"}], "max_tokens": 60}

    def text(**fields: Any) -> str:
        response = http.post(CHAT, json=body | fields)
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content

    free = text()
    banned = text(bad_words=["44", "of"])
    assert "44" in free
    assert "44" not in banned
    assert "of" not in banned
    letter = http.post("/tokenize", json={"prompt": "z", "add_special_tokens": False}).json()["tokens"][0]
    assert set(text(logit_bias={str(letter): 100})) == {"z"}
    assert set(text(allowed_token_ids=[letter], max_tokens=5)) == {"z"}
    usage = http.post(CHAT, json=body | {"min_tokens": 55, "stop": ["."]}).json()["usage"]
    assert usage["completion_tokens"] <= 55  # a stop string may end it earlier; an end token may not
    usage = http.post(CHAT, json=body | {"min_tokens": 55}).json()["usage"]
    assert usage["completion_tokens"] >= 55
