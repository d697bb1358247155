"""What does not fit the context is 400 with the code and the words that clients match; the limit is in the message."""

from __future__ import annotations

import re
from typing import Any

import httpx
import openai
import pytest

from tests.support.patience import HANG_SECONDS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = "word " * 4000
ENDLESS = "y" * 10**6
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": ENDLESS}]}, "messages"),
        (CHAT, {"messages": [USER], "max_tokens": 4096}, "messages"),
        (CHAT, {"messages": [USER], "max_completion_tokens": 4096, "stream": True}, "messages"),
        (COMPLETIONS, {"prompt": LONG}, "prompt"),
        (COMPLETIONS, {"prompt": ENDLESS}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", LONG]}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 2048}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 2048}, "prompt"),
    ],
)
def test_too_long(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    response = http.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("This model's maximum context length is 2048 tokens. However, ")


def test_the_length_that_fits_is_named(http: httpx.Client) -> None:
    body = {"messages": [USER], "max_tokens": 4096}
    message = http.post(CHAT, json=body).json()["error"]["message"]
    found = re.search(r"you requested (\d+) tokens \((\d+) in the messages, 4096 in the completion\)", message)
    assert found is not None
    assert int(found[1]) == int(found[2]) + 4096
    room = re.search(r"at most (\d+) tokens fit the completion", message)
    assert room is not None
    assert int(room[1]) == 2048 - int(found[2])
    fitting = body | {"max_tokens": int(room[1]), "stop": "a"}
    assert http.post(CHAT, json=fitting, timeout=HANG_SECONDS).status_code == 200


def test_a_default_length_is_cut_to_what_fits(http: httpx.Client) -> None:
    found = http.post(COMPLETIONS, json={"prompt": [5] * 2040, "ignore_eos": True}).json()
    assert found["usage"]["completion_tokens"] == 8


def test_the_official_client_knows_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": LONG}])
    assert raised.value.code == "context_length_exceeded"
