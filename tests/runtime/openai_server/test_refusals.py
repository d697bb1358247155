"""Refusals have the right status and OpenAI's shape, and reveal nothing internal."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.serving.malformed_bodies import WIDE, malformed, wide
from scripts.serving.server_process import KEY, Served, serving
from tests.support.patience import HANG_SECONDS
from trimode.runtime.openai_server.app import NOT_OFFERED

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    assert "/" not in error["message"].replace("application/json", "")
    return error


BAD_BODIES: dict[str, tuple[str, object, int, str | None, str]] = {
    "no messages": (CHAT, {}, 400, "messages", "Field required"),
    "empty messages": (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    "tools": (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools.0.function", "Field required"),
    "tool_choice": (CHAT, {"messages": HELLO, "tool_choice": "required"}, 400, "tool_choice", "needs tools"),
    "store": (CHAT, {"messages": HELLO, "store": True}, 400, "store", "not stored"),
    "obfuscation": (
        CHAT,
        {"messages": HELLO, "stream": True, "stream_options": {"include_obfuscation": True}},
        400,
        "stream_options.include_obfuscation",
        "padding of stream events",
    ),
    "tier": (CHAT, {"messages": HELLO, "service_tier": "flex"}, 400, "service_tier", "one service tier"),
    "two lengths": (
        CHAT,
        {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4},
        400,
        "max_tokens",
        "send one of them",
    ),
    "seed": (CHAT, {"messages": HELLO, "seed": 2**63}, 400, "seed", "less than"),
    "many fields": (CHAT, {str(number): 1 for number in range(101)}, 400, None, "at most 100 fields, not 101"),
    "unknown role": (CHAT, {"messages": [{"role": "cat", "content": ""}]}, 400, "messages.0.role", "'system'"),
    "picture": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "'text'"),
    "text as number": (CHAT, {"messages": HELLO, "max_tokens": "9"}, 400, "max_tokens", "integer"),
    "flag as number": (CHAT, {"messages": HELLO, "stream": 1}, 400, "stream", "boolean"),
    "negative temperature": (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature", "greater"),
    "unknown mode": (CHAT, {"messages": HELLO, "mode": "fast"}, 400, "mode", "'linear_spec'"),
    "contradiction": (CHAT, {"messages": HELLO, "mode": "ar", "block_length": 8}, 400, None, "block_length has no"),
    "greedy n": (CHAT, {"messages": HELLO, "n": 2, "temperature": 0}, 400, None, "greedy"),
    "top_logprobs alone": (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs", "logprobs"),
    "another model": (CHAT, {"messages": HELLO, "model": "gpt"}, 404, "model", "tiny"),
    "no length": (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens", "at least 1"),
    "65 prompts": (COMPLETIONS, {"prompt": ["a"] * 65}, 400, "prompt", "65 prompts were sent; the limit is 64"),
    "17 stops": (
        CHAT,
        {"messages": HELLO, "stop": ["a"] * 17},
        400,
        "stop",
        "17 stop strings were sent; the limit is 16",
    ),
    "65 stop tokens": (CHAT, {"messages": HELLO, "stop_token_ids": [1] * 65}, 400, "stop_token_ids", "the limit is 64"),
    "65 parts": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 65}]},
        400,
        "messages.0.content",
        "65 content parts were sent; the limit is 64",
    ),
    "2,049 messages": (CHAT, {"messages": HELLO * 2049}, 400, "messages", "the limit is 2048"),
    "half a character": (COMPLETIONS, {"prompt": "\ud800"}, 400, "prompt", "Unicode"),
    "no such token": (COMPLETIONS, {"prompt": [5, 99999]}, 400, None, "99999"),
    "no prompt": (COMPLETIONS, {"prompt": []}, 400, "prompt", ""),
    "empty token list": (COMPLETIONS, {"prompt": [[]]}, 400, "prompt.0", "at least 1"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_bodies(http: httpx.Client, case: str) -> None:
    path, body, status, param, message = BAD_BODIES[case]
    response = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = error_of(response)
    assert response.status_code == status, error
    assert message in error["message"]
    assert param is None or error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"] == {404: "model_not_found"}.get(status)


RAW = {
    "nothing": b"",
    "truncated": b'{"messages": [{"role"',
    "not UTF-8": b'{"prompt": "\xff"}',
    "not an object": b"[1]",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": 1e999}',
    "a long number": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "null byte": b"\0",
}


@pytest.mark.parametrize("case", RAW)
def test_unreadable_bodies(http: httpx.Client, case: str) -> None:
    response = http.post(COMPLETIONS, content=RAW[case], headers={"content-type": "application/json"})
    assert response.status_code == 400
    error_of(response)


NESTED = "@"
TOOL_CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}, "more": NESTED}
NESTING: dict[str, dict[str, Any]] = {
    "tools": {
        "messages": HELLO,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"anyOf": [NESTED]}}}],
    },
    "documents": {"messages": HELLO, "documents": [{"a": NESTED}]},
    "template variables": {"messages": HELLO, "chat_template_kwargs": {"a": NESTED}},
    "a call in a history": {"messages": [*HELLO, {"role": "assistant", "tool_calls": [TOOL_CALL]}]},
    "a schema": {"messages": HELLO, "guided_json": {"anyOf": [NESTED]}},
}


@pytest.mark.parametrize("case", NESTING)
@pytest.mark.parametrize("depth", [150, 300, 440])
def test_nested_bodies(served: Served, http: httpx.Client, case: str, depth: int) -> None:
    """Deep enough for the recursion limits of one library or another, less deep than the JSON parser's."""
    begun = len(served.log)
    body = json.dumps({"max_tokens": 1, **NESTING[case]}).replace(f'"{NESTED}"', '{"anyOf":[' * depth + "]}" * depth)
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        error_of(response)
    assert served.log[begun:] == []


@pytest.mark.parametrize("kind", WIDE)
def test_wide_bodies(served: Served, http: httpx.Client, kind: str) -> None:
    """Bodies of the largest size; a finding must not be made for each element."""
    before = served.peak_mib()
    path, body = wide(kind)
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert len(error_of(response)["message"]) < 1000
    assert served.peak_mib() - before < 256
    assert http.get("/health").status_code == 200


UNREADABLE = {
    "truncated": b'{"prompt": "' + b"y" * 4_000_000,
    "not UTF-8": b'{"prompt": "' + b"\xff" * 4_000_000 + b'"}',
    "half a character": b'{"prompt": "\\ud800' + b"y" * 4_000_000 + b'"}',
    "deep": b'{"prompt": ' + b"[" * 4_000_000,
    "many keys": wide("keys")[1],
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_refused_body_is_not_kept(served: Served, http: httpx.Client, case: str) -> None:
    before = served.peak_mib()
    for _ in range(30):
        response = http.post(COMPLETIONS, content=UNREADABLE[case], headers={"content-type": "application/json"})
        assert response.status_code == 400
    assert served.peak_mib() - before < 100  # two or three of them at most


def test_a_name_as_long_as_a_body_is_not_repeated(http: httpx.Client) -> None:
    response = http.post(CHAT, json={"messages": HELLO, "max_tokens": 1, "x" * 1_000_000: 1})
    assert response.status_code == 200
    assert response.headers["x-trimode-ignored-fields"] == "x" * 64 + "..."


def test_another_content_type(http: httpx.Client) -> None:
    """Other content types need no CORS preflight, so any web page could send them."""
    response = http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "application/json" in error_of(response)["message"]


def test_many_malformed_bodies(served: Served, http: httpx.Client) -> None:
    """A sample of `scripts/serving/malformed_bodies.py`, the same each run."""
    for number in range(200):
        path, body = malformed(number)
        response = http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code < 500, (number, response.text)
        if response.status_code != 200:
            error_of(response)
    assert served.process.poll() is None
    assert [line for line in served.log if "ignored unknown fields" not in line] == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=64))
def test_any_bytes(http: httpx.Client, body: bytes) -> None:
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        *((f"{beginning}anything", reason) for beginning, reason in NOT_OFFERED.items()),
        ("/v1/embeddings", "embeddings are not offered"),
        ("/v1/images/generations", "images are not offered"),
        ("/v1/responses/resp_1", "responses are not stored"),
        ("/v1/nothing", "this path does not exist"),
    ],
)
def test_what_is_not_offered(http: httpx.Client, path: str, reason: str) -> None:
    refused = http.post(path, json={"model": "tiny", "input": "a"})
    assert refused.status_code == 404
    error = refused.json()["error"]
    if not path.startswith("/v1/messages"):  # whose errors are in Anthropic's shape
        assert (error["code"], error["type"]) == ("not_found", "invalid_request_error")
    assert error["message"].startswith(reason)


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert error_of(http.get("/v2/anything"))["code"] == "not_found"
    response = http.delete(CHAT)
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert http.get("/docs").status_code == 404
    assert http.get("/../../etc/passwd").status_code == 404


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", KEY, f"Basic {KEY}", "Bearer x", f"Bearer {KEY}x", "Bearer ü".encode()]
)
@pytest.mark.parametrize("path", ["/v1/models", CHAT, "/metrics", "/openapi.json", "/nowhere"])
def test_without_the_key_nothing_is_revealed(served: Served, header: str | None, path: str) -> None:
    response = httpx.get(
        f"{served.url}{path}", headers={} if header is None else {"authorization": header}, timeout=HANG_SECONDS
    )
    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


def test_the_official_client_knows_the_errors(served: Served) -> None:
    stranger = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("none")
        with pytest.raises(openai.BadRequestError, match="mode"):
            client.completions.create(model="tiny", prompt="a", extra_body={"mode": "fast"})


def test_open_paths_need_no_key(served: Served) -> None:
    assert httpx.get(f"{served.url}/health", timeout=HANG_SECONDS).json() == {"status": "ok"}
    page = httpx.get(f"{served.url}/", timeout=HANG_SECONDS)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]


def test_a_body_over_the_limit_is_not_read(tiny_engine: Path) -> None:
    with (
        serving(tiny_engine, "--max-body", "1000") as server,
        httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as http,
    ):
        http.headers["authorization"] = f"Bearer {KEY}"
        http.headers["content-type"] = "application/json"
        announced = http.post(COMPLETIONS, content=b"x" * 1001)
        chunked = http.post(COMPLETIONS, content=iter([b"x" * 400] * 3))
        for response in (announced, chunked):
            assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
        assert http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_full_queue_is_429_with_retry_after(tiny_engine: Path) -> None:
    body = {"prompt": "abc", "max_tokens": 300, "ignore_eos": True, "mode": "ar"}
    with serving(tiny_engine, "--max-batch", "1", "--max-queue", "1") as server:
        headers = {"authorization": f"Bearer {KEY}"}
        found: list[httpx.Response] = []

        def ask() -> None:
            found.append(httpx.post(f"{server.url}{COMPLETIONS}", json=body, headers=headers, timeout=HANG_SECONDS))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(response.status_code for response in found)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        assert set(statuses) == {200, 429}
        for response in found:
            if response.status_code == 429:
                assert error_of(response)["code"] == "queue_full"
                assert int(response.headers["retry-after"]) >= 1


def test_what_the_queue_can_never_hold_is_not_429(tiny_engine: Path) -> None:
    """Clients would repeat the request, and it would fail again."""
    with serving(tiny_engine, "--max-batch", "1", "--max-queue", "1") as server:
        headers = {"authorization": f"Bearer {KEY}"}
        response = httpx.post(
            f"{server.url}{COMPLETIONS}", json={"prompt": ["a", "b", "c"]}, headers=headers, timeout=HANG_SECONDS
        )
        assert response.status_code == 400
        assert "needs 3 answers, but this server runs or queues at most 2" in error_of(response)["message"]


def test_an_answer_that_takes_too_long(tiny_engine: Path) -> None:
    body = {"prompt": "abc", "max_tokens": 2000, "ignore_eos": True, "mode": "ar", "n": 16, "temperature": 1.0}
    with serving(tiny_engine, "--request-seconds", "1") as server:
        headers = {"authorization": f"Bearer {KEY}"}
        response = httpx.post(f"{server.url}{COMPLETIONS}", json=body, headers=headers, timeout=HANG_SECONDS)
        assert (response.status_code, error_of(response)["code"]) == (422, "request_timeout")
        assert response.headers["x-should-retry"] == "false"
        streamed = httpx.post(
            f"{server.url}{COMPLETIONS}", json=body | {"stream": True}, headers=headers, timeout=HANG_SECONDS
        )
        assert streamed.text.strip().splitlines()[-1].startswith('data: {"error":{"message":"the response took longer')
        server.wait_until_idle(HANG_SECONDS)
        assert server.metrics()["trimode_answers_total"] == 0  # none was computed to its end


def test_a_port_in_use_is_one_line(served: Served, tiny_engine: Path) -> None:
    port = served.url.rpartition(":")[2]
    with (
        pytest.raises(RuntimeError, match=rf"trimode: cannot listen on 127\.0\.0\.1:{port}: "),
        serving(tiny_engine, "--port", port),
    ):
        pass


def test_it_listens_on_the_loopback_interface_only(served: Served) -> None:
    port = int(served.url.rpartition(":")[2])
    other = socket.gethostbyname(socket.gethostname())
    if other.startswith("127."):
        other = "127.0.0.2"  # loopback too, and not the address it was given
    with pytest.raises(ConnectionRefusedError), socket.create_connection((other, port), timeout=1):
        pass
