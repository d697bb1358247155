"""Host names that a server without a key accepts, and the time limit of a body."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from scripts.serving.server_process import Served, serving
from tests.support.patience import HANG_SECONDS
from trimode import LLM
from trimode.runtime.openai_server.app import create_app
from trimode.runtime.openai_server.gate import Gate
from trimode.runtime.openai_server.service import Service

OURS = ["", "localhost", "localhost:8000", "LocalHost:1", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"]
OURS += ["0.0.0.0", "0.0.0.0:8000", "[::]:8000", "192.168.1.5:8000", "127.0.1.1"]  # noqa: S104
OTHERS = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "::1", "[evil]"]
OTHERS += ["0.0.0.0.evil.example", "1", "0x7f.1", "[127.0.0.1]"]


def status(server: Served, host: str, path: str = "/v1/models") -> int:
    return httpx.get(f"{server.url}{path}", headers={"host": host}, timeout=HANG_SECONDS).status_code


def test_dns_rebinding_protection(tiny_engine: Path) -> None:
    """A page of another site can make its own name point to this machine, but not send another name as ``Host``."""
    with serving(tiny_engine, key="") as server:
        assert {host: status(server, host) for host in OURS} == dict.fromkeys(OURS, 200)
        assert {host: status(server, host) for host in OTHERS} == dict.fromkeys(OTHERS, 421)
        assert status(server, "evil.example", "/") == 421
        assert status(server, "trimode.default.svc.cluster.local", "/health") == 200
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
        refused = httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"}, timeout=HANG_SECONDS).json()
        assert refused["error"]["code"] == "wrong_host"


def test_any_host_name_with_a_key_or_on_all_interfaces(served: Served, tiny_engine: Path) -> None:
    assert status(served, "proxied.example", "/health") == 200
    with serving(tiny_engine, "--host", "0.0.0.0", key="") as server:  # noqa: S104
        assert status(server, "trimode.example") == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_does_not_come_in_time(tiny_engine: Path, path: str) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async def talk(llm: LLM) -> httpx.Response:
        gate = Gate(create_app(Service(llm, "tiny", 60)), api_key=None, max_body=1000, body_seconds=0.1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://test") as client:
            return await client.post(path, content=slow(), headers={"content-type": "application/json"})

    with LLM(tiny_engine) as llm:
        response = asyncio.run(asyncio.wait_for(talk(llm), 10))
    assert (response.status_code, response.json()["error"]["code"]) == (408, "body_timeout")
    assert response.headers["connection"] == "close"  # or what is left of the body would keep it open
