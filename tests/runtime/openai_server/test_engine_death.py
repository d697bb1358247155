"""A dead scheduler: ``/health`` says so, requests get 503, and the server exits so that a supervisor restarts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from tests.support.patience import HANG_SECONDS
from trimode import LLM
from trimode.runtime.openai_server.app import create_app
from trimode.runtime.openai_server.service import Service

BODY = {"prompt": "abc", "max_tokens": 4}
REASON = "the scheduler's thread ends"


def end(*_: Any) -> None:
    raise SystemExit(REASON)


def test_health_and_requests(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(tiny_engine) as llm:
        client = TestClient(create_app(Service(llm, "tiny", 60)))
        assert client.get("/health").json() == {"status": "ok"}
        monkeypatch.setattr(llm._scheduler, "step", end)
        for body in (BODY, BODY, BODY | {"n": 2, "temperature": 1.0}):
            response = client.post("/v1/completions", json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
            assert response.headers["x-should-retry"] == "true"
        health = client.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_dead")
        assert REASON in health.json()["error"]["message"]
        streamed = client.post("/v1/completions", json=BODY | {"stream": True})
        assert streamed.status_code == 503


def test_the_server_exits_with_code_1(tiny_engine: Path) -> None:
    program = (
        "from trimode.runtime.scheduling.scheduler import Scheduler\n"
        f"def end(*_): raise SystemExit({REASON!r})\n"
        "Scheduler.step = end\n"
        "from trimode.cli.main import main; main()"
    )
    command = [sys.executable, "-c", program, "serve", str(tiny_engine), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "TRIMODE_API_KEY"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        response = httpx.post(f"{url}/v1/completions", json=BODY, timeout=HANG_SECONDS)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        log = server.stderr.read()
        assert server.wait(HANG_SECONDS) == 1
    assert f"the scheduler has stopped: SystemExit({REASON!r})".replace("'", '"') in log.replace("'", '"')
    assert "the server exits with code 1" in log
