"""Served names and their aliases, which select a mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.serving.server_process import KEY, serving
from tests.support.patience import HANG_SECONDS
from trimode.runtime.openai_server.http_errors import ApiError
from trimode.runtime.openai_server.model_names import ModelNames

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is 60% of 440?"}]


def passes(http: httpx.Client, **fields: Any) -> dict[str, int]:
    body = {"messages": QUESTION, "return_token_origins": True, **fields}
    response = http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    found = response.json()["choices"][0]["trimode"]["passes"]
    return {kind: found[kind] for kind in ("draft", "denoise", "commit")}


def test_an_alias_selects_the_mode(http: httpx.Client) -> None:
    assert passes(http, model="tiny:ar") == passes(http, model="tiny", mode="ar")
    assert passes(http, model="tiny:diffusion") == passes(http, model="tiny", mode="diffusion")
    assert passes(http, model="tiny:diffusion")["denoise"] > 0
    assert passes(http, model="tiny:linear_spec") == passes(http, model="tiny", mode="linear_spec")
    assert passes(http, model="tiny:diffusion", mode="diffusion")["denoise"] > 0
    conflict = http.post(CHAT, json={"messages": QUESTION, "model": "tiny:ar", "mode": "diffusion"})
    assert (conflict.status_code, conflict.json()["error"]["param"]) == (400, "mode")


def test_the_response_has_the_requested_name(http: httpx.Client) -> None:
    for name in ("tiny", "tiny:ar"):
        body = {"messages": QUESTION, "model": name, "max_tokens": 1}
        assert http.post(CHAT, json=body).json()["model"] == name
    assert http.post(CHAT, json={"messages": QUESTION, "max_tokens": 1}).json()["model"] == "tiny"


def test_several_names(tiny_engine: Path) -> None:
    names = ("--served-model-name", "org/model-8b", "--served-model-name", "gpt-4o")
    with serving(tiny_engine, *names) as server:
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=HANG_SECONDS) as http:
            listed = http.get("/v1/models").json()["data"]
            assert [found["id"] for found in listed[:3]] == ["tiny", "org/model-8b", "gpt-4o"]
            for name in ("tiny", "org/model-8b", "gpt-4o", "gpt-4o:ar"):
                assert http.get(f"/v1/models/{name}").json()["root"] == name.removesuffix(":ar")
                body = {"messages": QUESTION, "model": name, "max_tokens": 1}
                assert http.post(CHAT, json=body).json()["model"] == name
            for name in ("gpt-3.5-turbo", "tiny:fast", "default"):
                refused = http.post(CHAT, json={"messages": QUESTION, "model": name})
                assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
                assert "tiny, org/model-8b, gpt-4o" in refused.json()["error"]["message"]


def test_the_program_of_the_docs(tiny_engine: Path) -> None:
    """A model that was built from a checkpoint has the checkpoint's name."""
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    program = text.partition("```python\n")[2].partition("```")[0]
    assert "chat.completions.create" in program
    with serving(tiny_engine, key="", name=None) as server:
        values: dict[str, Any] = {}
        exec(program.replace("http://127.0.0.1:8000", server.url), values)  # noqa: S102
        assert "440" in values["answer"].choices[0].message.content
        assert values["answer"].model == "tiny"


def test_a_served_name_with_a_colon() -> None:
    names = ModelNames(["llama:8b", "llama", "llama:ar"])
    assert names.resolve("llama:8b").mode is None
    assert names.resolve("llama:8b:ar") == ("llama:8b:ar", "llama:8b", "ar")
    assert names.resolve("llama:ar") == ("llama:ar", "llama:ar", None)  # a served name takes precedence
    assert names.resolve(None).name == names.resolve("").name == "llama:8b"
    with pytest.raises(ApiError, match="'gpt' does not exist"):
        names.resolve("gpt")
