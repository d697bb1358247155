"""A server as the target of a benchmark, with a server that sends given bytes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from trimode.common.errors import TriModeError
from trimode.runtime.benchmark.prompts import BenchmarkPrompt
from trimode.runtime.benchmark.served import ServedTarget
from trimode.runtime.benchmark.targets import Answered

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 7, "prompt_tokens": 3}}\n\ndata: [DONE]\n\n'
CHUNKS = (
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    b': a comment\n\ndata: {"choices": [{"delta": {"content": "a"}}], "usage": null}\n\n'
    b'data: {"choices": [{"delta": {"tool_calls": [{}]}}]}\n\ndata: {"choices": [{"delta": {}}]}\n\n'
)


def ask(response: bytes, prompt: BenchmarkPrompt, path: str = "") -> tuple[Answered, str, dict[str, Any]]:
    """The answer, and the head and the body of the request."""
    received = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        received.extend(head + await reader.readexactly(length))
        writer.write(response)
        writer.close()

    async def run() -> Answered:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            target = ServedTarget(f"http://127.0.0.1:{port}{path}", model="m", api_key="sk")
            return await target.answer(prompt, {"max_tokens": 7, "mode": "ar"})

    found = asyncio.run(run())
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    return found, head.decode(), json.loads(body)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_a_chat(path: str) -> None:
    found, head, body = ask(HEAD + CHUNKS + USAGE, [{"role": "user", "content": "Hi"}], path)
    assert (found.tokens, found.prompt_tokens, len(found.gaps)) == (7, 3, 1)
    assert 0 < found.first <= found.seconds
    assert head.startswith("POST /v1/chat/completions HTTP/1.0\r\n")
    assert "Authorization: Bearer sk" in head
    assert body == {
        "messages": [{"role": "user", "content": "Hi"}],
        "model": "m",
        "max_tokens": 7,
        "mode": "ar",
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_text() -> None:
    chunk = b'data: {"choices": [{"text": "a"}]}\n\n'
    found, head, body = ask(HEAD + chunk + USAGE, "Once", "/behind/a/proxy/v1")
    assert (found.tokens, found.gaps) == (7, [])
    assert head.startswith("POST /behind/a/proxy/v1/completions ")
    assert body["prompt"] == "Once"


BAD = {
    "status 404: no such model": b'HTTP/1.1 404 Not Found\r\n\r\n{"error": {"message": "no such model"}}',
    "status 502: Bad gateway": b"HTTP/1.1 502 Bad Gateway\r\n\r\nBad\n gateway",
    "status missing": b"",
    "the engine has stopped": HEAD + b'data: {"error": {"message": "the engine has stopped"}}\n\n',
    "an event is not JSON": HEAD + b"data: {x\n\n",
    "without the usage": HEAD + CHUNKS,
}


@pytest.mark.parametrize("message", BAD)
def test_bad_responses(message: str) -> None:
    with pytest.raises(TriModeError, match=f"^127.0.0.1:[0-9]+: .*{message}"):
        ask(BAD[message], "Once")


@pytest.mark.parametrize("url", ["http://", "ftp://a", "http://a:99999", "http://a:b"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(TriModeError, match=r"URL of a server|port"):
        ServedTarget(url)


def test_no_server() -> None:
    with pytest.raises(TriModeError, match=r"127\.0\.0\.1:1: "):
        asyncio.run(ServedTarget("http://127.0.0.1:1").answer("Once", {}))
