"""``/tokenize``, ``/detokenize``, ``/tokenizer_info`` and ``/version`` in vLLM's shapes."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from trimode import __version__

CHAT = [{"role": "user", "content": "What is 60% of 440?"}]


def test_text(http: httpx.Client) -> None:
    found = http.post(
        "/tokenize", json={"model": "tiny", "prompt": "a\N{EURO SIGN}b", "return_token_strs": True}
    ).json()
    assert found.keys() == {"count", "max_model_len", "tokens", "token_strs"}
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) > 3
    assert found["max_model_len"] == 2048
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "a\N{EURO SIGN}b"}
    assert http.post("/tokenize", json={"prompt": "a"}).json()["token_strs"] is None
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_chat(http: httpx.Client) -> None:
    """The ids are those of the prompt that the chat endpoint makes."""
    for fields in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"enable_thinking": True}}):
        body = {"messages": CHAT, **fields}
        tokens = http.post("/tokenize", json=body).json()["tokens"]
        used = http.post("/v1/chat/completions", json=body | {"max_tokens": 1}).json()["usage"]["prompt_tokens"]
        assert len(tokens) == used
        text = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        assert "What is 60% of 440?<|im_end|>" in text
        assert text.endswith("<think>\n") == ("chat_template_kwargs" in fields)
        assert ("<|im_start|>assistant" in text) == ("add_generation_prompt" not in fields)


def test_refusals(http: httpx.Client) -> None:
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/tokenize", json={"prompt": "a", "model": "gpt"}).status_code == 404
    outside = http.post("/detokenize", json={"tokens": [99999]})
    assert (outside.status_code, outside.json()["error"]["param"]) == (400, "tokens")
    assert http.post("/detokenize", json={"tokens": ["a"]}).status_code == 400


def test_tokenizer_info(http: httpx.Client, tiny_checkpoint: Path) -> None:
    found = http.get("/tokenizer_info").json()
    config = json.loads((tiny_checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert found["tokenizer_class"] == config["tokenizer_class"]
    assert found["chat_template"] == (tiny_checkpoint / "chat_template.jinja").read_text(encoding="utf-8")


def test_version(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": __version__}
