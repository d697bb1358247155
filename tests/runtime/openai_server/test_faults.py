"""An internal error: the client gets no reason, and the next request is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from trimode import LLM
from trimode.runtime.openai_server.app import create_app
from trimode.runtime.openai_server.service import Service

BODY = {"prompt": "abc", "max_tokens": 4, "mode": "ar"}
REASON = "cannot map /srv/engines/secret.bin"


def with_client(llm: LLM, talk: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        app = httpx.ASGITransport(create_app(Service(llm, "tiny", 60)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=app, base_url="http://test") as client:
            await talk(client)

    asyncio.run(run())


def test_an_internal_error(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(REASON)

    async def talk(client: httpx.AsyncClient) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(llm._executor, "run", fail)
            whole = await client.post("/v1/completions", json=BODY)
            streamed = await client.post("/v1/completions", json=BODY | {"stream": True})
        assert (whole.status_code, whole.json()["error"]["code"]) == (500, "internal_error")
        assert '"internal_error"' in streamed.text.strip().splitlines()[-1]
        assert "secret" not in whole.text + streamed.text
        assert "Traceback" not in whole.text + streamed.text
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200

    with LLM(tiny_engine) as llm:
        with_client(llm, talk)


def test_after_shutdown_it_is_503(tiny_engine: Path) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        llm.shutdown()
        response = await client.post("/v1/completions", json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")

    with_client(llm := LLM(tiny_engine), talk)
