"""OpenAI's own client against a real server over the trained tiny model: answers, streams, fields, usage."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

QUESTION = [{"role": "user", "content": "What is 60% of 440?"}]
ANSWER = "10% of 440 is 44. Ones: 4x6=24, carry 2. Tens: 4x6=24, 24+2=26. So 60% of 440 is 264."
PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat is 60% of 440?<|im_end|>\n"
    "<|im_start|>assistant\n<think></think>"
)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    ours = {name: fields.pop(name) for name in list(fields) if name in OURS}
    return client.chat.completions.create(**{"model": "tiny", "messages": QUESTION} | fields, extra_body=ours)


OURS = {
    "mode",
    "block_length",
    "threshold",
    "max_thinking_tokens",
    "chat_template_kwargs",
    "return_token_origins",
    "top_k",
    "ignore_eos",
    "include_stop_str_in_output",
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mode": "ar"},
        {"mode": "linear_spec", "block_length": 8},
        {"temperature": 0},
        {
            "messages": [
                {"role": "developer", "content": ""},
                {"role": "user", "content": [{"type": "text", "text": "What is 60% of 440?"}]},
            ]
        },
    ],
)
def test_a_greedy_answer(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    found = chat(client, **fields)
    (choice,) = found.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (ANSWER, "assistant", "stop")
    assert found.object == "chat.completion"
    assert found.usage.prompt_tokens == 27
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


@pytest.mark.parametrize("mode", ["ar", "linear_spec", "diffusion", "auto"])
def test_a_stream_is_the_answer(client: openai.OpenAI, mode: str) -> None:
    whole = chat(client, mode=mode)
    chunks = list(chat(client, mode=mode, stream=True, stream_options={"include_usage": True}))
    *received, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in received) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in received] == [None] * (len(received) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in received)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert len(received) >= 3  # the role, the first tokens, the end


def test_reasoning_is_separate_also_in_streams(client: openai.OpenAI) -> None:
    think = {"chat_template_kwargs": {"enable_thinking": True}}
    whole = chat(client, **think)
    message = whole.choices[0].message
    assert message.reasoning_content
    assert "think" not in message.reasoning_content + message.content
    reasoning = content = ""
    for chunk in chat(client, stream=True, **think):
        reasoning += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        content += chunk.choices[0].delta.content or ""
    assert (reasoning, content) == (message.reasoning_content, message.content)
    assert 0 < whole.usage.completion_tokens_details.reasoning_tokens < whole.usage.completion_tokens


def test_the_beginning_of_a_mark_is_not_lost(client: openai.OpenAI) -> None:
    """An answer that ends in the middle of ``</think>``."""
    cut = {"chat_template_kwargs": {"enable_thinking": True}, "include_stop_str_in_output": True}
    whole = chat(client, stop="</thi", **cut).choices[0].message.reasoning_content
    assert whole.endswith("</thi")
    chunks = chat(client, stop="</thi", stream=True, **cut)
    assert "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks) == whole


def test_a_thinking_budget_closes_the_thought(client: openai.OpenAI) -> None:
    found = chat(client, chat_template_kwargs={"enable_thinking": True}, max_thinking_tokens=4)
    assert found.usage.completion_tokens_details.reasoning_tokens == 4
    assert found.choices[0].message.content


def test_length_and_stop(client: openai.OpenAI) -> None:
    short = chat(client, max_completion_tokens=5)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 5)
    assert chat(client, max_tokens=5).choices[0].message.content == short.choices[0].message.content
    stopped = chat(client, stop=[" Tens", "zebra"])
    assert stopped.choices[0].message.content == ANSWER.partition(" Tens")[0]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, stop=" Tens", stream=True))
    assert streamed == ANSWER.partition(" Tens")[0]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="to its end token"),
        pytest.param({"ignore_eos": True, "max_tokens": 120}, id="beyond its end tokens"),
        pytest.param({"chat_template_kwargs": {"enable_thinking": True}}, id="after a thought"),
        pytest.param({"stop": " Tens"}, id="to a stop string"),
        pytest.param({"stop": "4, 2"}, id="to a stop string of several tokens"),
    ],
)
def test_logprobs_are_those_of_the_content(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    choice = chat(client, logprobs=True, **fields).choices[0]
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content != ""
    content, received = "", []
    for chunk in chat(client, logprobs=True, stream=True, **fields):
        content += chunk.choices[0].delta.content or ""
        if chunk.choices[0].logprobs:
            received += chunk.choices[0].logprobs.content
    assert content == choice.message.content
    assert [entry.token for entry in received] == [entry.token for entry in choice.logprobs.content]
    # Blocks that auto chooses otherwise change the rounding.
    expected = [entry.logprob for entry in choice.logprobs.content]
    assert [entry.logprob for entry in received] == pytest.approx(expected, abs=1e-4)


def test_seed_and_n(client: openai.OpenAI) -> None:
    drawn = [chat(client, temperature=3.0, seed=seed, max_tokens=12).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    several = chat(client, temperature=3.0, seed=1, n=2, max_tokens=12)
    assert [choice.message.content for choice in several.choices] == [drawn[0], drawn[2]]
    texts = ["", ""]
    for chunk in chat(client, temperature=3.0, seed=1, n=2, max_tokens=12, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [drawn[0], drawn[2]]


def test_logprobs(client: openai.OpenAI) -> None:
    found = chat(client, logprobs=True, top_logprobs=3, max_tokens=8)
    tokens = found.choices[0].logprobs.content
    assert "".join(entry.token for entry in tokens) == found.choices[0].message.content
    for entry in tokens:
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3
    streamed = chat(client, logprobs=True, top_logprobs=3, max_tokens=8, stream=True)
    received = [entry for chunk in streamed if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in received] == [entry.token for entry in tokens]
    alone = chat(client, logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in alone] == [[], []]


NEUTRAL: dict[str, Any] = {
    "audio": None,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "max_completion_tokens": 200,
    "max_tokens": 200,
    "metadata": {"team": "a"},
    "modalities": ["text"],
    "parallel_tool_calls": False,
    "prediction": None,
    "prompt_cache_key": "a",
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "safety_identifier": "a",
    "seed": -(2**63),
    "service_tier": "auto",
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
    "user": "a",
}


def test_neutral_openai_fields(client: openai.OpenAI) -> None:
    """Also with an earlier answer in the conversation, as the client returns it."""
    assert chat(client, **NEUTRAL).choices[0].message.content == ANSWER
    earlier = chat(client).choices[0].message.model_dump() | {"annotations": [], "tool_calls": []}
    messages = [*QUESTION, earlier, {"role": "user", "content": "Spell planet and ladder."}]
    options = {"include_usage": False, "include_obfuscation": False}
    received = chat(client, messages=messages, stream=True, stream_options=options)
    spelt = "planet: p-l-a-n-e-t. ladder: l-a-d-d-e-r."
    assert "".join(chunk.choices[0].delta.content or "" for chunk in received) == spelt
    neutral = {"prompt": PROMPT, "best_of": 1, "echo": False, "suffix": None, "logit_bias": {}, "max_tokens": 200}
    assert client.completions.create(model="tiny", **neutral).choices[0].text == ANSWER


def test_every_seed_that_openai_accepts(client: openai.OpenAI) -> None:
    hot = {"temperature": 3.0, "max_tokens": 12}
    seeds = (-2, -2, 1, -(2**63), 2**63 - 1)
    drawn = [chat(client, seed=seed, **hot).choices[0].message.content for seed in seeds]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4
    several = chat(client, seed=2**63 - 1, n=2, **hot)  # the second seed is 2**63
    assert [choice.message.content for choice in several.choices] == [
        drawn[4],
        chat(client, seed=-(2**63), **hot).choices[0].message.content,
    ]


def test_seed_minus_one_is_random(client: openai.OpenAI) -> None:
    drawn = {chat(client, seed=-1, temperature=3.0, max_tokens=24).choices[0].message.content for _ in range(4)}
    assert len(drawn) > 1


def test_penalties_change_the_answer(client: openai.OpenAI) -> None:
    assert chat(client, presence_penalty=2.0, max_tokens=60).choices[0].message.content != ANSWER
    assert chat(client, frequency_penalty=2.0, max_tokens=60).choices[0].message.content != ANSWER


def test_token_origins(http: httpx.Client) -> None:
    body = {"messages": QUESTION, "mode": "linear_spec", "block_length": 8, "return_token_origins": True}
    whole = http.post("/v1/chat/completions", json=body).json()
    received = whole["choices"][0]["trimode"]
    assert "".join(received["pieces"]) == ANSWER
    assert len(received["pieces"]) == len(received["origins"]) == whole["usage"]["completion_tokens"]
    assert received["origins"][0] == "prefill"
    assert set(received["origins"][1:]) == {"accepted", "bonus"}
    assert received["origins"].count("accepted") == received["passes"]["accepted"] > received["passes"]["cycles"] > 1
    assert (
        http.post("/v1/chat/completions", json=body | {"mode": "diffusion"})
        .json()["choices"][0]["trimode"]["origins"]
        .count("denoised")
    )
    assert "trimode" not in http.post("/v1/chat/completions", json={"messages": QUESTION}).json()["choices"][0]


@pytest.mark.parametrize("options", [{"mode": "linear_spec", "tree_width": 16}, {"mode": "auto"}, {"mode": "ar"}])
def test_cycles_of_token_origins(http: httpx.Client, options: dict[str, Any]) -> None:
    """In a stream, each chunk has the cycles of its tokens. The accepted drafts are in the text."""
    body = {"messages": QUESTION, "return_token_origins": True, "stream": True, **options}
    lines = http.post("/v1/chat/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    found = [choice["trimode"] for chunk in chunks for choice in chunk["choices"] if "trimode" in choice]
    for number, chunk in enumerate(found):
        of_prefill = int(number == 0)
        assert sum(cycle["emitted"] for cycle in chunk["cycles"]) == len(chunk["pieces"]) - of_prefill
    cycles = [cycle for chunk in found for cycle in chunk["cycles"]]
    assert len(cycles) == found[-1]["passes"]["cycles"]
    assert sum(cycle["drafting"] == "tree" for cycle in cycles) == found[-1]["passes"]["trees"]
    for cycle in cycles:
        assert len(cycle["pieces"]) == cycle["verified"]
        assert (cycle["parents"] is not None) == (cycle["drafting"] == "tree")
        assert ("expected to be fastest" in cycle["reason"]) == (options["mode"] == "auto")
        assert cycle["path"][0] == 0
    path = "".join(cycle["pieces"][node] for cycle in cycles for node in cycle["path"])
    assert path.removesuffix("<|im_end|>") == ANSWER


def test_completions(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (ANSWER, "stop")
    assert client.completions.create(model="tiny", prompt=PROMPT).usage.completion_tokens == 16
    several = client.completions.create(
        model="tiny", prompt=[PROMPT, "abc"], max_tokens=9, n=2, temperature=1.0, seed=3
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    for chunk in client.completions.create(
        model="tiny", prompt=[PROMPT, "abc"], max_tokens=9, n=2, temperature=1.0, seed=3, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in several.choices]


def test_completion_logprobs(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, logprobs=2).choices[0]
    assert "".join(found.logprobs.tokens) == found.text
    assert found.logprobs.text_offset == [
        found.text.index(found.text[offset:]) for offset in found.logprobs.text_offset
    ]
    assert all(len(row) >= 2 for row in found.logprobs.top_logprobs)


def test_models(client: openai.OpenAI) -> None:
    aliases = ["tiny:auto", "tiny:ar", "tiny:diffusion", "tiny:linear_spec"]
    assert [model.id for model in client.models.list()] == ["tiny", *aliases]
    for name in ("tiny", *aliases):
        assert client.models.retrieve(name).owned_by == "trimode"


def test_metrics(http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json={"messages": QUESTION})
    text = http.get("/metrics").text
    for name in ("trimode_tokens_emitted_total", "trimode_slots", 'trimode_passes_total{kind="commit"}'):
        assert f"\n{name} " in text
    assert "trimode_time_to_first_token_seconds_count 0" not in text
    for name in (
        "trimode_auto_choices_total{",
        "trimode_drafting_cycles_total{",
        'trimode_auto_expected_tokens{block="1"}',
    ):
        assert f"\n{name}" in text
