"""Bodies as clients send them: neutral values are accepted, other values of missing features are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.serving.server_process import KEY, Served, serving
from tests.support.patience import HANG_SECONDS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "What is 60% of 440?"}
ANSWER = "10% of 440 is 44. Ones: 4x6=24, carry 2. Tens: 4x6=24, 24+2=26. So 60% of 440 is 264."
BEGINNING = "10% of"  # four tokens
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}

NULLABLE = (
    "audio best_of chat_template chat_template_kwargs continue_final_message documents echo frequency_penalty "
    "function_call functions guided_json ignore_eos logit_bias logprobs max_completion_tokens metadata min_p "
    "min_tokens modalities mode model n parallel_tool_calls prediction presence_penalty prompt_logprobs "
    "reasoning_effort repetition_penalty response_format seed service_tier stop stop_token_ids store stream "
    "stream_options structured_outputs temperature tool_choice tools top_k top_logprobs top_p user verbosity "
    "web_search_options unknown"
)
# Fields that leave the greedy answer as it is.
NEUTRAL: dict[str, Any] = {
    "null everywhere": dict.fromkeys(NULLABLE.split()),
    "vLLM's defaults": {
        "add_generation_prompt": True,
        "add_special_tokens": False,
        "best_of": 1,
        "continue_final_message": False,
        "early_stopping": False,
        "echo": False,
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "length_penalty": 1.0,
        "min_p": 0.0,
        "min_tokens": 0,
        "n": 1,
        "priority": 0,
        "repetition_penalty": 1.0,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "stop_token_ids": [],
        "top_k": -1,
        "use_beam_search": False,
    },
    "SGLang's defaults": {
        "ebnf": None,
        "json_schema": None,
        "min_tokens": 0,
        "regex": None,
        "separate_reasoning": True,
        "stream_reasoning": True,
        "top_k": -1,
    },
    "OpenAI's defaults": {
        "frequency_penalty": 0,
        "function_call": "none",
        "functions": [],
        "logit_bias": {},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "store": False,
        "temperature": 0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1,
        "verbosity": "medium",
    },
    "tools that may not be called": {"tools": [TOOL], "tool_choice": "none"},
    "functions that may not be called": {"functions": [TOOL["function"]], "function_call": "none"},
    "a bias of zero": {"logit_bias": {"300": 0}},
    "no stop": {"stop": ""},
    "a list of no stops": {"stop": ["", None]},
    "options without a stream": {"stream": False, "stream_options": {"include_usage": True}},
    "template variables of another model": {"chat_template_kwargs": {"thinking": False, "enable_thinking": None}},
    "empty objects": {"audio": {}, "prediction": {}, "logit_bias": {}, "response_format": {}, "structured_outputs": {}},
    "empty objects as PHP writes them": {"logit_bias": [], "response_format": [], "chat_template_kwargs": []},
    "no effort": {"reasoning_effort": ""},
    "no thinking, by effort": {"reasoning_effort": "none"},
    "least thinking, by effort": {"reasoning_effort": "minimal"},
    "a least length that changes nothing": {"min_tokens": 4, "ignore_eos": True},
    "whole numbers as decimals": {"max_tokens": 4.0, "top_k": 1.0, "n": 1.0, "seed": 3.0, "block_length": 8.0},
    "more candidates than the engine returns": {"top_k": 1000, "temperature": 0},
    "min_p of a greedy request": {"min_p": 0.05, "temperature": 0},
    "the newer length": {"max_tokens": None, "max_completion_tokens": 4},
    "the older length without limit": {"max_tokens": -1, "max_completion_tokens": 4},
    "a model without a name": {"model": ""},
    "no documents": {"documents": []},
    "a beam length penalty": {"length_penalty": 0.5},
}
HISTORIES: dict[str, list[dict[str, Any]]] = {
    "content null": [USER, {"role": "assistant", "content": None}, USER],
    "no content": [USER, {"role": "assistant"}, USER],
    "no parts": [USER, {"role": "assistant", "content": []}, USER],
    "a tool turn": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "264"},
        USER,
    ],
    "a tool turn in parts": [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "264"}]},
        USER,
    ],
    "a function turn": [
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "f", "content": "1"},
        USER,
    ],
    "an earlier response": [
        {
            "role": "assistant",
            "content": "264",
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": None,
            "reasoning": "hm",
            "reasoning_content": "hm",
            "id": "chatcmpl-1",
            "type": "message",
            "status": "completed",
        },
        USER,
    ],
    "a refusal": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, USER],
    "a message with a type and a name": [USER | {"type": "text", "name": "text"}],
    "a part with cache_control": [
        {"role": "user", "content": [{"type": "text", "text": USER["content"], "cache_control": {"type": "ephemeral"}}]}
    ],
    "a part of the newer API": [{"role": "user", "content": [{"type": "input_text", "text": USER["content"]}]}],
    "a message with cache_control": [USER | {"cache_control": {"type": "ephemeral"}}],
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a required tool without tools": ("tool_choice", {"tool_choice": "required"}),
    "a tool that is not there": (
        "tool_choice",
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    ),
    "the same tool twice": ("tools", {"tools": [TOOL, TOOL]}),
    "tools with a regular expression": ("guided_regex", {"tools": [TOOL], "guided_regex": "a+"}),
    "functions": ("functions", {"functions": [TOOL["function"]]}),
    "prompt_logprobs": ("prompt_logprobs", {"prompt_logprobs": 1}),
    "min_tokens above max_tokens": ("min_tokens", {"min_tokens": 5}),
    "a bias of no token": ("logit_bias", {"logit_bias": {"x": 1}}),
    "a bias that is too large": ("logit_bias.300", {"logit_bias": {"300": 101}}),
    "too many biases": ("logit_bias", {"logit_bias": {str(token): 1 for token in range(301)}}),
    "an unknown format": ("response_format", {"response_format": {"type": "xml"}}),
    "a format without its schema": ("response_format", {"response_format": {"type": "json_schema"}}),
    "a schema that is wrong": ("guided_json", {"guided_json": {"type": "foo"}}),
    "a regex that is wrong": ("guided_regex", {"guided_regex": "a{"}),
    "a grammar that is an object": ("grammar", {"grammar": {"root": "a"}}),
    "an unknown part of a format": ("structured_outputs", {"structured_outputs": {"json": {}, "xml": True}}),
    "two formats": ("guided_regex", {"guided_regex": "a+", "response_format": {"type": "json_object"}}),
    "beam search": ("use_beam_search", {"use_beam_search": True}),
    "audio": ("audio", {"audio": {"voice": "alloy", "format": "wav"}}),
    "verbosity": ("verbosity", {"verbosity": "low"}),
    "web search": ("web_search_options", {"web_search_options": {}}),
    "another template": ("chat_template", {"chat_template": "{{ messages }}"}),
    "both ends of a prompt": (
        "continue_final_message",
        {"continue_final_message": True, "add_generation_prompt": True},
    ),
    "numbers as text": ("temperature", {"temperature": "0.7"}),
    "part of a token": ("max_tokens", {"max_tokens": 4.5}),
}


PARTS_OF_TEXT = [{"role": "user", "content": [{"type": "text", "text": USER["content"]}]}]
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
# Whole bodies of benchmarks: each streams four tokens and ends with the usage.
BENCHMARKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vllm bench serve, chat": (
        CHAT,
        {"messages": PARTS_OF_TEXT, "max_completion_tokens": 4, "ignore_eos": True, "temperature": 0.0},
    ),
    "vllm bench serve, completions": (
        COMPLETIONS,
        {"prompt": "abc", "repetition_penalty": 1.0, "max_tokens": 4, "logprobs": None, "ignore_eos": True},
    ),
    "guidellm": (
        CHAT,
        {"messages": PARTS_OF_TEXT, "max_completion_tokens": 4, "max_tokens": 4, "stop": None, "ignore_eos": True},
    ),
    "genai-perf": (CHAT, {"messages": [USER], "max_tokens": 4, "min_tokens": 4, "ignore_eos": True}),
    "lm-eval, token ids": (
        COMPLETIONS,
        {"prompt": [[5, 300, 301]], "max_tokens": 4, "temperature": 0, "stop": None, "seed": 1234, "ignore_eos": True},
    ),
}


@pytest.mark.parametrize("case", BENCHMARKS)
def test_benchmarks(http: httpx.Client, case: str) -> None:
    path, body = BENCHMARKS[case]
    events = chunks(http, path, body | {"model": "tiny"} | STREAM)
    assert events[-1]["usage"]["completion_tokens"] == 4
    assert [choice["finish_reason"] for choice in events[-2]["choices"]] == ["length"]


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("case", NEUTRAL)
def test_neutral_values(http: httpx.Client, case: str) -> None:
    body = {"messages": [USER], "max_tokens": 4, **NEUTRAL[case]}
    assert content(http.post(CHAT, json=body)).startswith(BEGINNING)


@pytest.mark.parametrize("case", HISTORIES)
def test_histories(http: httpx.Client, case: str) -> None:
    response = http.post(CHAT, json={"messages": HISTORIES[case], "max_tokens": 4})
    assert content(response) == BEGINNING
    assert "x-trimode-ignored-fields" not in response.headers


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(http: httpx.Client, case: str) -> None:
    param, fields = REFUSED[case]
    response = http.post(CHAT, json={"messages": [USER], "max_tokens": 4, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]


PARTS = [
    {"type": "image_url", "image_url": {"url": "data:,"}},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    {"type": "file", "file": {}},
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part["type"])
def test_parts_other_than_text(http: httpx.Client, part: dict[str, Any]) -> None:
    response = http.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]})
    assert response.status_code == 400
    assert "parts other than text are not supported" in response.json()["error"]["message"]


def test_unknown_fields_are_listed(served: Served, http: httpx.Client) -> None:
    body = {
        "messages": [USER | {"mood": 1}, USER | {"mood": 2}],
        "max_tokens": 4,
        "typical_p": 1.0,
        "keep_alive": "5m",
        "nothing": None,
        "a, b\r\nü": 1,
        "stream_options": {"chunk_size": 3},
    }
    for stream in (False, True):
        headers = {"x-request-id": f"unknown-{stream}"}
        response = http.post(CHAT, json=body | {"stream": stream}, headers=headers)
        assert response.status_code == 200
        listed = response.headers["x-trimode-ignored-fields"].split(", ")
        escaped = "a\\u002c b\\r\\n\\u00fc"
        assert sorted(listed) == sorted(
            ["typical_p", "keep_alive", escaped, "messages[].mood", "stream_options.chunk_size"]
        )
        lines = [line for line in served.log if f"unknown-{stream}" in line]
        assert len(lines) == 1
        assert all(name in lines[0] for name in listed)


def test_strict_fields(tiny_engine: Path) -> None:
    with serving(tiny_engine, "--strict-fields") as server:
        headers = {"authorization": f"Bearer {KEY}"}
        body = {"messages": [USER], "max_tokens": 4, "typical_p": 1.0}
        response = httpx.post(f"{server.url}{CHAT}", json=body, headers=headers, timeout=HANG_SECONDS)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "typical_p")
        del body["typical_p"]
        assert httpx.post(f"{server.url}{CHAT}", json=body, headers=headers, timeout=HANG_SECONDS).status_code == 200


def test_a_temperature_is_implied_where_greedy_has_no_meaning(http: httpx.Client) -> None:
    """OpenAI's default temperature is 1."""
    texts: set[str] = set()
    for _ in range(6):
        body = {"prompt": "Once", "n": 4, "max_tokens": 12}
        texts |= {choice["text"] for choice in http.post(COMPLETIONS, json=body).json()["choices"]}
    assert len(texts) > 1


def test_length_without_limit(http: httpx.Client) -> None:
    body = {"prompt": "abc " * 600, "max_tokens": -1, "ignore_eos": True, "mode": "linear_spec"}
    whole = http.post(COMPLETIONS, json=body, timeout=HANG_SECONDS).json()
    assert whole["usage"]["total_tokens"] == 2048
    assert content(http.post(CHAT, json={"messages": [USER], "max_tokens": -1})) == ANSWER


def test_best_of(http: httpx.Client) -> None:
    """The best by log-probability per token, of the same candidates that ``n`` returns."""
    fields = {"prompt": "Once", "max_tokens": 8, "temperature": 2.0, "seed": 5, "logprobs": 0}
    every = http.post(COMPLETIONS, json=fields | {"n": 6}).json()["choices"]
    score = {choice["text"]: sum(found := choice["logprobs"]["token_logprobs"]) / len(found) for choice in every}
    best = http.post(COMPLETIONS, json=fields | {"n": 2, "best_of": 6}).json()
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    ranked = sorted(score, key=lambda text: -score[text])
    assert [choice["text"] for choice in best["choices"]] == ranked[:2]
    assert (
        "logprobs"
        not in http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2, "best_of": 2}).json()["choices"][0]
    )
    for wrong in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}):
        refused = http.post(COMPLETIONS, json=fields | wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of")


def test_echo(http: httpx.Client) -> None:
    """Text and ids are repeated before the completion, whole and in a stream."""
    plain = {"prompt": "abc", "max_tokens": 4}
    text = http.post(COMPLETIONS, json=plain).json()["choices"][0]["text"]
    echoed = plain | {"echo": True}
    assert http.post(COMPLETIONS, json=echoed).json()["choices"][0]["text"] == "abc" + text
    streamed = http.post(COMPLETIONS, json=echoed | {"stream": True}).text
    assert streamed.count('"text":"abc') == 1
    ids = http.post("/tokenize", json={"prompt": "abc"}).json()["tokens"]
    both = http.post(COMPLETIONS, json=echoed | {"prompt": [ids, ids]}).json()["choices"]
    assert [choice["text"] for choice in both] == ["abc" + text] * 2
    refused = http.post(COMPLETIONS, json=plain | {"logprobs": 1, "max_tokens": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_without_an_answer_scores_the_prompt(http: httpx.Client, stream: bool) -> None:
    """``echo`` with ``max_tokens`` 0: OpenAI's form of scoring a text."""
    body = {"prompt": ["What is 60% of 440?", "abc"], "echo": True, "logprobs": 1, "temperature": 0}
    scored = body | {"max_tokens": 0, "stream": stream, "stream_options": {"include_usage": True}}
    text = http.post(COMPLETIONS, json=scored).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    records = events if stream else [json.loads(text)]
    choices = [choice for record in records for choice in record["choices"]]
    usage = records[-1]["usage"]
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in choices] == [
        (0, "What is 60% of 440?", "length"),
        (1, "abc", "length"),
    ]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (0, usage["prompt_tokens"])
    answered = http.post(COMPLETIONS, json=body | {"max_tokens": 1}).json()["choices"]
    for choice, longer in zip(choices, answered, strict=True):
        assert choice["logprobs"] == {name: values[:-1] for name, values in longer["logprobs"].items()}


def test_log_probabilities_of_the_prompt(http: httpx.Client) -> None:
    """``echo`` with ``logprobs`` lists them before the answer's; ``prompt_logprobs`` has vLLM's shape."""
    ids = http.post("/tokenize", json={"prompt": "What is 60% of 440?"}).json()["tokens"]
    body = {"prompt": ids, "max_tokens": 3, "temperature": 0, "logprobs": 2}
    alone = http.post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
    echoed = http.post(COMPLETIONS, json=body | {"echo": True}).json()["choices"][0]
    listed = echoed["logprobs"]
    count = len(ids)
    assert [len(part) for part in listed.values()] == [count + 3] * 4
    assert listed["tokens"][count:] == alone["tokens"]
    assert listed["token_logprobs"][count:] == alone["token_logprobs"]
    assert listed["token_logprobs"][0] is None
    assert listed["top_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in listed["token_logprobs"][1:])
    assert echoed["text"].startswith("What is 60% of 440?")
    assert "prompt_logprobs" not in echoed
    streamed = http.post(COMPLETIONS, json=body | {"echo": True, "stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line.startswith("data: {")]
    of_chunks = [event["choices"][0]["logprobs"] for event in events if event["choices"]]
    assert [token for part in of_chunks for token in part["tokens"]] == listed["tokens"]
    assert [value for part in of_chunks for value in part["token_logprobs"]] == listed["token_logprobs"]
    of_vllm = http.post(COMPLETIONS, json=body | {"prompt_logprobs": 1}).json()["choices"][0]
    assert of_vllm["logprobs"] == alone
    assert of_vllm["prompt_logprobs"][0] is None
    for place, row in enumerate(of_vllm["prompt_logprobs"][1:], start=1):
        assert row[str(ids[place])]["logprob"] == pytest.approx(listed["token_logprobs"][place], abs=1e-6)
        assert row[str(ids[place])]["decoded_token"] == listed["tokens"][place]
    for count_of_prompt, status in ((21, 400), (-1, 400), (False, 200)):
        assert http.post(COMPLETIONS, json=body | {"prompt_logprobs": count_of_prompt}).status_code == status


COMPLETION_NEUTRAL: dict[str, Any] = {
    "suffix": {"suffix": ""},
    "logprobs false": {"logprobs": False},
    "best_of of one": {"best_of": 1},
    "best_of of equal candidates": {"best_of": 3, "temperature": 0},
    "evalscope": {"seed": 0, "stop": [], "stop_token_ids": [], "temperature": 0.0},
    "special tokens": {"add_special_tokens": True},
}


@pytest.mark.parametrize("case", COMPLETION_NEUTRAL)
def test_neutral_values_of_completions(http: httpx.Client, case: str) -> None:
    plain = {"prompt": "abc", "max_tokens": 4}
    expected = http.post(COMPLETIONS, json=plain).json()["choices"][0]
    response = http.post(COMPLETIONS, json=plain | COMPLETION_NEUTRAL[case])
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0] == expected


def test_effort_maps_to_thinking(http: httpx.Client) -> None:
    def reasons(**fields: Any) -> bool:
        body = {"messages": [USER], "max_tokens": 8, **fields}
        return bool(http.post(CHAT, json=body).json()["choices"][0]["message"].get("reasoning_content"))

    assert [reasons(reasoning_effort=effort) for effort in ("none", "minimal")] == [False, False]
    assert [reasons(reasoning_effort=effort) for effort in ("low", "medium", "high")] == [True, True, True]
    assert not reasons(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})


def test_continued_message(http: httpx.Client) -> None:
    begun = {"role": "assistant", "content": ANSWER[:10]}
    body = {"messages": [USER, begun], "continue_final_message": True}
    assert content(http.post(CHAT, json=body)) == ANSWER[10:]
    assert content(http.post(CHAT, json=body | {"add_generation_prompt": False})) == ANSWER[10:]


def test_usage_in_every_chunk(http: httpx.Client) -> None:
    for path, prompt in ((CHAT, {"messages": [USER]}), (COMPLETIONS, {"prompt": "abc"})):
        body = prompt | {"max_tokens": 8, "stream": True, "mode": "ar", "ignore_eos": True}
        options = {"include_usage": True, "continuous_usage_stats": True}
        usages = [event["usage"] for event in chunks(http, path, body | {"stream_options": options})]
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
        assert counts[-1] == 8
        last_only = [event["usage"] for event in chunks(http, path, body | {"stream_options": {"include_usage": True}})]
        assert last_only[:-1] == [None] * (len(last_only) - 1)
        assert last_only[-1]["completion_tokens"] == 8
        none = chunks(http, path, body | {"stream_options": {"continuous_usage_stats": True}})
        assert all("usage" not in event for event in none)


def chunks(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = http.post(path, json=body).text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
